"""Selection when the scores are split over shards that are never gathered.

The k-th largest score is found digit by digit, from the most significant, on the bits of the
floats: each pass histograms the next digit of the scores that share the digits found so far, and
only the histograms are added over shards (256 counts a pass, 4 passes for float32, 8 for
float64). The result is that of :func:`sparsetrain.selection.top_k` on the concatenated shards.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsetrain._comparable import check_count, check_none_bad, comparable, in_layer
from sparsetrain._threshold import SMALL, no_less, quantiles

SumCounts = Callable[[Tensor], Tensor]
"""Adds a CPU tensor of numbers over all processes (such as an all-reduce) and returns the sum."""

_DIGIT = 8
_SAMPLE = 1 << 14


def _only_here(counts: Tensor) -> Tensor:
    return counts


def top_k_shards(
    local: Sequence[Tensor],
    k: int,
    sum_counts: SumCounts = _only_here,
    *,
    shards: Sequence[int] | None = None,
    total_shards: int | None = None,
    name: str = "",
) -> list[Tensor]:
    """Masks of the ``k`` largest scores over all shards, for the shards held here.

    Every process calls this with its own shards and the same ``k``; ties go to the earlier shard,
    then the lower index within it. An error is raised in every process alike.

    Args:
        local: shards held by this process, any shapes, possibly none.
        k: number to select over all shards of all processes.
        sum_counts: adds counts over processes; the identity for a single one.
        shards: place of each of ``local`` among all shards; default: the first ones.
        total_shards: number of shards in all processes; default: those held here.
        name: layer named in errors.

    Returns:
        Bool tensors of the shapes of ``local``; over all processes exactly ``k`` are true.

    Raises:
        ValueError: for ``k`` out of range and for NaN or infinite scores on any process.
    """
    total_shards = len(local) if total_shards is None else total_shards
    shards = range(len(local)) if shards is None else shards
    if len(shards) != len(local) or not all(0 <= shard < total_shards for shard in shards):
        raise ValueError(
            f"{list(shards)} are not the places of {len(local)} shards among {total_shards}: check "
            "shards and total_shards"
        )
    flat, numel, dtype = _agreed(local, k, sum_counts, name)
    if k == 0:
        return [torch.zeros_like(shard, dtype=torch.bool) for shard in local]
    likely = _likely(flat, k, numel, sum_counts, shards, total_shards)
    codes = [_encode(values[found]) for values, found in zip(flat, likely, strict=True)]
    # A process without shards still takes part in every sum.
    taking_part = codes or [_encode(torch.empty(0, dtype=dtype))]
    threshold, above = _radix_select(taking_part, k, sum_counts, _counter(numel))
    ties = torch.zeros(total_shards, dtype=torch.int64)
    for place, code in zip(shards, codes, strict=True):
        ties[place] = torch.count_nonzero(code == threshold)
    ties = sum_counts(ties)
    earlier = torch.cumsum(ties, 0) - ties
    masks = []
    for place, code, found, shard in zip(shards, codes, likely, local, strict=True):
        room = max(k - above - int(earlier[place]), 0)
        best = code > threshold
        best[torch.nonzero(code == threshold).squeeze(1)[:room]] = True
        mask = torch.zeros(shard.numel(), dtype=torch.bool, device=shard.device)
        mask[found] = best
        masks.append(mask.view(shard.shape))
    return masks


def _likely(
    flat: Sequence[Tensor],
    k: int,
    numel: int,
    sum_counts: SumCounts,
    shards: Sequence[int],
    total_shards: int,
) -> list[Any]:
    """Of each shard what may be among the ``k`` largest: indices, or all of it.

    Samples say how low the smallest of them will hardly be; if no fewer than ``k`` scores are that
    large, the rest need not be looked at. A wrong guess costs time, never correctness.
    """
    everything: list[Any] = [slice(None)] * len(flat)
    if numel <= SMALL:
        return everything
    guesses = torch.zeros(total_shards, 2, dtype=torch.float64)
    for place, values in zip(shards, flat, strict=True):
        if values.numel():
            guesses[place] = torch.tensor([_guess(values, k / numel), 1.0])
    bars, held = sum_counts(guesses).unbind(1)
    bar = float(bars[held > 0].min())
    found = [_no_less(values, bar) for values in flat]
    count = sum_counts(torch.tensor([sum(indices.numel() for indices in found)]))
    return found if int(count) >= k else everything


def _no_less(values: Tensor, bar: float) -> Tensor:
    if values.device.type != "cpu" or values.numel() == 0:
        return torch.nonzero(values >= bar).squeeze(1)
    return torch.from_numpy(no_less(values.numpy(), bar))


def _guess(values: Tensor, share: float) -> float:
    """A value that rather more than this share of the values are above."""
    sample = values[:: max(values.numel() // _SAMPLE, 1) | 1].cpu().numpy()
    return float(quantiles(sample.copy(), share, largest=True)[1])


def least_within(
    local: Sequence[Tensor],
    sizes: Sequence[int],
    limit: int,
    sum_counts: SumCounts = _only_here,
    *,
    shards: Sequence[int],
    total_shards: int,
) -> list[Tensor]:
    """Masks of the smallest values over all shards that together are no larger than ``limit``.

    Values are taken in ascending order, ties to the earlier shard, up to the first that does not
    fit any more.

    Args:
        local: shards held by this process, as in :func:`top_k_shards`.
        sizes: what each value of a shard counts; the same for it on every process.
        limit: what may be taken.
        shards, total_shards: as in :func:`top_k_shards`.
    """
    codes, _ = _agreed_codes([-values for values in local], 0, sum_counts, "")
    border = _radix_border(codes, sizes, limit, sum_counts, torch.int64)
    if border is None:
        return [torch.ones_like(values, dtype=torch.bool) for values in local]
    code_there, taken = border
    table = torch.zeros(total_shards, 2, dtype=torch.int64)
    for place, code, size in zip(shards, codes, sizes, strict=True):
        # Every process writes the size of its own shards alone, so that they add up.
        table[place] = torch.tensor([int(torch.count_nonzero(code == code_there)), size])
    rooms = _rooms(sum_counts(table).tolist(), limit - taken)
    masks = []
    for place, code in zip(shards, codes, strict=True):
        mask = code > code_there
        mask[torch.nonzero(code == code_there).squeeze(1)[: rooms[place]]] = True
        masks.append(mask)
    return masks


def _rooms(ties: Sequence[tuple[int, int]], limit: int) -> list[int]:
    """How many ties of each shard fit, in order, of (their number, the size of each)."""
    rooms = [0] * len(ties)
    for place, (count, size) in enumerate(ties):
        rooms[place] = min(count, limit // max(size, 1))
        limit -= rooms[place] * size
        if rooms[place] < count:
            break
    return rooms


def radix_threshold(
    local: Sequence[Tensor], k: int, sum_counts: SumCounts = _only_here, *, name: str = ""
) -> float:
    """The k-th largest score over all shards, exactly, ``1 <= k <= number of scores``.

    Arguments and errors as in :func:`top_k_shards`.
    """
    if k < 1:
        raise ValueError(f"{in_layer(name)}the threshold of k={k} scores is not defined: k >= 1")
    codes, count_dtype = _agreed_codes(local, k, sum_counts, name)
    threshold, _ = _radix_select(codes, k, sum_counts, count_dtype)
    return _decode(threshold, codes[0].dtype)


def _agreed(
    local: Sequence[Tensor], k: int, sum_counts: SumCounts, name: str
) -> tuple[list[Tensor], int, torch.dtype]:
    """The shards as vectors of one dtype, the number of scores, and the dtype, on which all
    processes agree; they find all scores valid."""
    flat = [comparable(shard).reshape(-1) for shard in local]
    bad = sum(_count_bad(shard) for shard in flat)
    numel = sum(shard.numel() for shard in flat)
    double = any(shard.dtype == torch.float64 for shard in flat)
    bad, numel, double = sum_counts(torch.tensor([bad, numel, int(double)])).tolist()
    check_none_bad(bad, numel, name)
    check_count(k, numel, name)
    dtype = torch.float64 if double else torch.float32
    return [shard.to(dtype) for shard in flat], numel, dtype


def _count_bad(values: Tensor) -> int:
    # A finite sum proves every term finite.
    if torch.isfinite(values.sum()):
        return 0
    return int(torch.count_nonzero(~torch.isfinite(values)))


def _agreed_codes(
    local: Sequence[Tensor], k: int, sum_counts: SumCounts, name: str
) -> tuple[list[Tensor], torch.dtype]:
    """Integer images of the shards, and the integer type that their number fits in."""
    flat, numel, dtype = _agreed(local, k, sum_counts, name)
    # A process without shards still takes part in every sum.
    codes = [_encode(shard) for shard in flat] or [_encode(torch.empty(0, dtype=dtype))]
    return codes, _counter(numel)


def _counter(numel: int) -> torch.dtype:
    return torch.int32 if numel < 1 << 31 else torch.int64


def _radix_select(
    codes: Sequence[Tensor], k: int, sum_counts: SumCounts, count_dtype: torch.dtype
) -> tuple[int, int]:
    """The code of the k-th largest and the number of codes above it."""
    ones = [1] * len(codes)
    border = _radix_border(codes, ones, k - 1, sum_counts, count_dtype)
    assert border is not None  # k is no more than the number of codes
    return border


def _radix_border(
    codes: Sequence[Tensor],
    sizes: Sequence[int],
    limit: int,
    sum_counts: SumCounts,
    count_dtype: torch.dtype,
) -> tuple[int, int] | None:
    """Going down from the largest code: the first one at which sizes add up to more than `limit`,
    and what those above it add up to; None if all together are no more."""
    bits = 32 if codes[0].dtype == torch.int32 else 64
    found, above = 0, 0
    candidates = list(codes)
    for shift in reversed(range(0, bits, _DIGIT)):
        width = min(_DIGIT, bits - shift)
        counts = torch.zeros(1 << width, dtype=count_dtype)
        digits = [_digit(code, shift, width) for code in candidates]
        for digit, size in zip(digits, sizes, strict=True):
            counts += torch.bincount(digit, minlength=1 << width).to(counts) * size
        from_top = sum_counts(counts).long().flip(0).cumsum(0)
        place = int(torch.searchsorted(from_top, limit - above, right=True))
        if place == from_top.numel():
            return None
        above += int(from_top[place - 1]) if place else 0
        value = (1 << width) - 1 - place
        found |= value << shift
        candidates = [code[digit == value] for code, digit in zip(candidates, digits, strict=True)]
    # The sign bit of the two's complement was flipped in the digits: undo that.
    return found - (1 << (bits - 1)), above


def _digit(codes: Tensor, shift: int, width: int) -> Tensor:
    """``width`` bits from ``shift`` of the codes, sign bit flipped so that order is unsigned."""
    bits = codes.element_size() * 8
    digit = (codes >> shift) & ((1 << width) - 1)
    return digit ^ (1 << (width - 1)) if shift + width == bits else digit


def _encode(values: Tensor) -> Tensor:
    """Signed integers in the order of the floats, equal where those are equal."""
    integer = torch.int32 if values.dtype == torch.float32 else torch.int64
    # Adding zero turns -0.0 into 0.0, which compare equal but differ in their bits.
    bits = (values + 0.0).view(integer)
    return torch.where(bits < 0, bits ^ torch.iinfo(integer).max, bits)


def _decode(code: int, dtype: torch.dtype) -> float:
    bits = code ^ torch.iinfo(dtype).max if code < 0 else code
    floating = torch.float32 if dtype == torch.int32 else torch.float64
    return float(torch.tensor(bits, dtype=dtype).view(floating))
