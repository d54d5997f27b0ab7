"""From scores and a count to a mask that holds exactly that many.

Everything here is exact and deterministic: of equal scores the one at the lower flat index wins
(across tensors, the earlier tensor), as a stable sort would have it. Nothing is sorted.

Scores may have any floating dtype (half precisions are compared in float32, integers in float64)
and must be finite.

Of a weight that is sharded over ranks every function takes the scores that are here, with the
`part` that adds up, and gives what is chosen here; k counts the whole weight. The choice is that of
one process with all scores, and errors are raised on every rank alike.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from sparsetrain._comparable import (
    check_count,
    check_finite,
    check_none_bad,
    comparable,
    in_layer,
)
from sparsetrain._threads import pieces, share_out
from sparsetrain._threshold import SMALL, Array, best, few_best, few_best_where, larger
from sparsetrain.part import Part
from sparsetrain.sharded_selection import top_k_shards
from sparsetrain.structures import NM, Block, Structure, Unstructured
from sparsetrain.units import from_units, to_units

# Values that are partitioned together, row by row, in the cache.
_CHUNK = 1 << 17


def top_k(scores: Tensor, k: int, *, name: str = "", part: Part | None = None) -> Tensor:
    """Mask of the ``k`` largest scores.

    Args:
        scores: any shape, finite.
        k: number to select, 0 to the number of scores.
        name: layer named in errors.
        part: of the weight that the scores are of; default: all of it.

    Returns:
        Bool tensor of the shape and device of ``scores`` with exactly ``k`` true.

    Raises:
        ValueError: for a ``k`` out of range and for NaN or infinite scores.
    """
    if part is not None and not part.is_whole:
        return _over_ranks({name: scores}, k, {name: part})[name]
    return _masks({name: scores}, k, largest=True)[name]


def top_k_indices(scores: Tensor, k: int, *, name: str = "") -> Tensor:
    """Flat indices (int64, ascending) of the ``k`` largest scores; see :func:`top_k`."""
    return _indices(scores, k, name, None, largest=True)


def bottom_k_indices(scores: Tensor, k: int, *, name: str = "", part: Part | None = None) -> Tensor:
    """Flat indices (int64, ascending) of the ``k`` smallest scores; see :func:`top_k`.

    Of a part, scores may also be of some of its weights, in their order.
    """
    return _indices(scores, k, name, part, largest=False)


def above(values: Tensor, bar: Tensor) -> Tensor:
    """Indices (int64, ascending) of the entries of a vector that are larger than ``bar``."""
    return torch.from_numpy(larger(values.numpy(), bar.item()))


def top_k_across(
    scores: Mapping[str, Tensor],
    k: int,
    minimum: int = 1,
    parts: Mapping[str, Part] | None = None,
) -> dict[str, Tensor]:
    """Masks of the ``k`` largest scores over all tensors together.

    Args:
        scores: layer name -> scores of any shape; the order settles ties between tensors.
        k: number to select over all tensors.
        minimum: number that every tensor keeps at least (all of it if it is smaller).
        parts: of the weights that the scores are of; default: all of each.

    Returns:
        Layer name -> bool tensor; together they hold exactly ``k`` true.

    Raises:
        ValueError: when ``k`` exceeds the number of scores or cannot give every tensor its
            minimum, and for NaN or infinite scores, naming the layer.
    """
    parts = {name: Part(tuple(v.shape)) for name, v in scores.items()} if parts is None else parts
    sizes = _totals({name: values.numel() for name, values in scores.items()}, parts)
    floors = {name: min(minimum, size) for name, size in sizes.items()}
    if k < sum(floors.values()):
        raise ValueError(
            f"k={k} cannot leave at least {minimum} in each of {len(floors)} layers: lower the "
            "sparsity or the minimum"
        )
    pool = dict(scores)
    masks: dict[str, Tensor] = {}
    # A tensor below its minimum stays below it when others are lifted, so its share is final.
    while True:
        chosen = _best_of_all(pool, k, parts)
        here = {name: int(torch.count_nonzero(mask)) for name, mask in chosen.items()}
        short = [name for name, count in _totals(here, parts).items() if count < floors[name]]
        if not short:
            masks.update(chosen)
            return {name: masks[name] for name in scores}
        for name in short:
            masks[name] = top_k(pool.pop(name), floors[name], name=name, part=parts[name])
            k -= floors[name]


def _best_of_all(
    scores: Mapping[str, Tensor], k: int, parts: Mapping[str, Part]
) -> dict[str, Tensor]:
    if all(parts[name].is_whole for name in scores):
        return _masks(scores, k, largest=True)
    return _over_ranks(scores, k, parts)


def _over_ranks(
    scores: Mapping[str, Tensor], k: int, parts: Mapping[str, Part]
) -> dict[str, Tensor]:
    """Masks of the ``k`` largest over all tensors and ranks, for what is here."""
    first, *others = (parts[name] for name in scores)
    for name, part in zip(list(scores)[1:], others, strict=True):
        if part.is_whole or first.is_whole or part.group != first.group:
            raise ValueError(
                f"{name} and {next(iter(scores))} are not shared out over the same ranks, so that "
                "their scores cannot be ranked together: give each a policy of its own by a rule"
            )
    if len(scores) > 1:
        bad = {n: int(torch.count_nonzero(~torch.isfinite(v))) for n, v in scores.items()}
        sizes = _totals({n: v.numel() for n, v in scores.items()}, parts)
        for name, count in _totals(bad, parts).items():
            check_none_bad(count, sizes[name], name)
    ranks = first.ranks
    shards = [number * ranks + first.rank for number in range(len(scores))]
    name = next(iter(scores)) if len(scores) == 1 else ""
    masks = top_k_shards(
        list(scores.values()),
        k,
        first.sum,
        shards=shards,
        total_shards=ranks * len(scores),
        name=name,
    )
    return dict(zip(scores, masks, strict=True))


def _totals(here: Mapping[str, int], parts: Mapping[str, Part]) -> dict[str, int]:
    """Counts of what is here, each added up over its ranks."""
    if not here:
        return {}
    first = parts[next(iter(here))]
    if any(part.group != first.group for part in parts.values()):
        return {name: parts[name].totals(count)[0] for name, count in here.items()}
    return dict(zip(here, first.totals(*here.values()), strict=True))


def select(
    scores: Tensor,
    k: int,
    structure: Structure | None = None,
    *,
    name: str = "",
    part: Part | None = None,
) -> Tensor:
    """Mask of ``k`` weights that obeys ``structure`` and keeps the best units.

    Args:
        scores: scores of the weights, in the shape of the weight.
        k: active weights, a multiple of ``structure.quantum`` (the fixed count for n:m).
        structure: default unstructured.
        name: layer named in errors.
        part: of the weight that the scores are of; default: all of it.

    Returns:
        Bool tensor of the shape of ``scores``; of the whole weight exactly ``k`` are true.

    Raises:
        ValueError: as :func:`top_k`, and for a shape or count the structure does not allow.
    """
    structure = Unstructured() if structure is None else structure
    part = Part(tuple(scores.shape)) if part is None else part
    shape = part.shape
    structure.check(shape, name)
    if isinstance(structure, Unstructured):
        return top_k(scores, k, name=name, part=part)
    numel = math.prod(shape)
    check_count(k, numel, name)
    quantum, fixed = structure.quantum(shape), structure.fixed_count(shape)
    if k % quantum or (fixed is not None and k != fixed):
        allowed = f"exactly {fixed}" if fixed is not None else f"a multiple of {quantum}"
        raise ValueError(f"{in_layer(name)}k={k} must be {allowed} for {structure!r}")
    units = to_units(structure, scores, part)
    per_group = k * units.shape[1] // numel
    return from_units(structure, unit_top_k(units, per_group, structure, part, name=name), part)


def unit_top_k(
    units: Tensor, k: int, structure: Structure, part: Part, *, name: str = ""
) -> Tensor:
    """As :func:`group_top_k` of what `to_units` gives; a bad score is an error on every rank."""
    if not (part.is_whole or isinstance(structure, Block)):
        bad, numel = part.totals(int(torch.count_nonzero(~torch.isfinite(units))), units.numel())
        check_none_bad(bad, numel, name)
    return group_top_k(units, k, name=name)


def n_m_mask(scores: Tensor, n: int, m: int, *, name: str = "", part: Part | None = None) -> Tensor:
    """Mask that keeps the ``n`` best of every ``m`` consecutive inputs (dimension 1)."""
    shape = tuple(scores.shape) if part is None else part.shape
    structure = NM(n=n, m=m)
    structure.check(shape, name)
    return select(scores, structure.fixed_count(shape), structure, name=name, part=part)


def group_top_k(units: Tensor, k: int, *, name: str = "") -> Tensor:
    """Mask of the ``k`` largest in each row of ``units`` ``[groups, units]``.

    Ties within a row go to the lower column. Raises ValueError as :func:`top_k`.
    """
    groups, size = units.shape
    check_count(k, size, name)
    if groups == 1:
        return top_k(units, k, name=name)
    values = comparable(units)
    check_finite(values, name)
    if k in (0, size):
        return torch.full(units.shape, k == size, device=units.device)
    if size <= 8:
        return _rank_by_pairs(values) < k
    threshold = _row_threshold(values, k)
    chosen = values >= threshold
    if int(torch.count_nonzero(chosen)) > k * groups:
        crowded = torch.nonzero(chosen.sum(1) > k).squeeze(1)
        strict = values[crowded] > threshold[crowded]
        tied = chosen[crowded] & ~strict
        room = k - strict.sum(1, keepdim=True)
        chosen[crowded] = strict | (tied & (tied.cumsum(1) <= room))
    return chosen


def _rank_by_pairs(values: Tensor) -> Tensor:
    """Rank of each value in its row (0 is the best), by comparing all pairs; for short rows."""
    ranks = torch.zeros(values.shape, dtype=torch.int8, device=values.device)
    for i in range(values.shape[1]):
        for j in range(i):
            earlier_wins = values[:, j] >= values[:, i]
            ranks[:, i] += earlier_wins
            ranks[:, j] += ~earlier_wins
    return ranks


def _row_threshold(values: Tensor, k: int) -> Tensor:
    """The k-th largest of each row, as a column."""
    if values.device.type == "cpu":
        return torch.from_numpy(_row_threshold_on_cpu(values.numpy(), k))
    return torch.topk(values, k, dim=1, sorted=False).values.amin(1, keepdim=True)


def _row_threshold_on_cpu(values: Array, k: int) -> Array:
    rows, size = values.shape
    found = np.empty((rows, 1), dtype=values.dtype)

    def find(piece: slice) -> None:
        first, last = piece.start // size, piece.stop // size
        step = max(_CHUNK // size, 1)
        for start in range(first, last, step):
            part = slice(start, min(start + step, last))
            found[part, 0] = np.partition(values[part], size - k, axis=1)[:, size - k]

    share_out(find, pieces(values.size))
    return found


def _indices(scores: Tensor, k: int, name: str, part: Part | None, *, largest: bool) -> Tensor:
    if part is not None and not part.is_whole:
        values = comparable(scores)
        mask = _over_ranks({name: values if largest else -values}, k, {name: part})[name]
        return torch.nonzero(mask.reshape(-1)).squeeze(1)
    if _suits_one_pass(scores, k):
        values = comparable(scores).reshape(-1)
        check_finite(values, name)
        found = few_best(values.numpy(), k, largest)
        if found is not None:
            return torch.from_numpy(found)
    mask = _masks({name: scores}, k, largest=largest)[name].reshape(-1)
    return torch.nonzero(mask).squeeze(1)


def _suits_one_pass(scores: Tensor, k: int) -> bool:
    return scores.device.type == "cpu" and scores.numel() > SMALL and 0 < k <= scores.numel()


def extreme_indices(
    values: Tensor,
    mask: Tensor,
    k: int,
    *,
    among: bool,
    largest: bool,
    name: str = "",
    part: Part | None = None,
) -> Tensor:
    """Flat indices of the ``k`` largest or smallest absolute values where ``mask`` is ``among``.

    The same as selecting from the list of those entries, without making that list.

    Args:
        values: any shape, finite where ``mask`` is ``among``.
        mask: bool, of the shape of ``values``.
        part: of the weight that the values are of; default: all of it.

    Returns:
        int64, ascending. Of equal values the one at the lower index is taken.

    Raises:
        ValueError: for a ``k`` out of range and for NaN or infinite values.
    """
    if part is None or part.is_whole:
        part = None
    if part is None and _suits_one_pass(values, k):
        flat, flags = comparable(values).reshape(-1), mask.reshape(-1)
        if torch.isfinite(flat.sum()):  # else the slower way below finds out which are not
            found = few_best_where(flat.numpy(), flags.numpy(), k, among, largest)
            if found is not None:
                return torch.from_numpy(found)
    if part is not None and largest:
        return _largest_over_ranks(values, mask if among else ~mask, k, name, part)
    eligible = (mask if among else ~mask).reshape(-1).nonzero().squeeze(1)
    chosen = values.reshape(-1)[eligible].abs()
    return eligible[_indices(chosen, k, name, part, largest=largest)]


def _largest_over_ranks(values: Tensor, eligible: Tensor, k: int, name: str, part: Part) -> Tensor:
    (count,) = part.totals(int(torch.count_nonzero(eligible)))
    check_count(k, count, name)
    # No magnitude is below 0, so the others are out without a list of those that are in.
    ranked = torch.where(eligible, values.detach().abs(), -1)
    return torch.nonzero(top_k(ranked, k, name=name, part=part).view(-1)).squeeze(1)


def _masks(scores: Mapping[str, Tensor], k: int, *, largest: bool) -> dict[str, Tensor]:
    """Masks of the ``k`` best over all tensors together."""
    name = next(iter(scores)) if len(scores) == 1 else ""
    check_count(k, sum(values.numel() for values in scores.values()), name)
    flat = {name: comparable(values).reshape(-1) for name, values in scores.items()}
    for name, values in flat.items():
        check_finite(values, name)
    dtype = torch.float64 if any(v.dtype == torch.float64 for v in flat.values()) else None
    parts = [values.to(dtype) if dtype else values for values in flat.values()]
    if k == 0:
        chosen = [torch.zeros(part.shape, dtype=torch.bool) for part in parts]
    elif all(part.device.type == "cpu" for part in parts):
        arrays = best([part.numpy() for part in parts], k, largest)
        chosen = [torch.from_numpy(array) for array in arrays]
    else:
        chosen = _best_on_device(parts, k, largest)
    return {
        name: mask.to(scores[name].device).reshape(scores[name].shape)
        for name, mask in zip(flat, chosen, strict=True)
    }


def _best_on_device(parts: Sequence[Tensor], k: int, largest: bool) -> list[Tensor]:
    """As :func:`_best`, on the device of the first part, the threshold by ``torch.topk``."""
    values = torch.cat([part.to(parts[0].device) for part in parts])
    best = torch.topk(values, k, largest=largest, sorted=False).values
    threshold = best.amin() if largest else best.amax()
    strict = values > threshold if largest else values < threshold
    ties = torch.nonzero(values == threshold).squeeze(1)
    strict[ties[: k - int(torch.count_nonzero(strict))]] = True
    return list(torch.split_with_sizes(strict, [part.numel() for part in parts]))
