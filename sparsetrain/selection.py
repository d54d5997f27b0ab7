"""From scores and a count to a mask that holds exactly that many.

Everything here is exact and deterministic: of equal scores the one at the lower flat index wins
(across tensors, the earlier tensor), as a stable sort would have it. Nothing is sorted: a strided
sample brackets the threshold, a few vectorised passes count what lies outside the bracket, and
only the candidates inside are partitioned. A bracket that misses costs time, never correctness.

Scores may have any floating dtype (half precisions are compared in float32, integers in float64)
and must be finite.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsetrain._comparable import check_count, check_finite, comparable, in_layer
from sparsetrain._threads import pieces, share_out
from sparsetrain.structures import NM, Structure, Unstructured

Array = NDArray[Any]

_SMALL = 1 << 14
_SAMPLE = 1 << 16
_FEW_TIES = 16
# Chunks stay in the cache between the passes over them.
_CHUNK = 1 << 18


def top_k(scores: Tensor, k: int, *, name: str = "") -> Tensor:
    """Mask of the ``k`` largest scores.

    Args:
        scores: any shape, finite.
        k: number to select, 0 to ``scores.numel()``.
        name: layer named in errors.

    Returns:
        Bool tensor of the shape and device of ``scores`` with exactly ``k`` true.

    Raises:
        ValueError: for a ``k`` out of range and for NaN or infinite scores.
    """
    return _masks({name: scores}, k, largest=True)[name]


def top_k_indices(scores: Tensor, k: int, *, name: str = "") -> Tensor:
    """Flat indices (int64, ascending) of the ``k`` largest scores; see :func:`top_k`."""
    return _indices(scores, k, name, largest=True)


def bottom_k_indices(scores: Tensor, k: int, *, name: str = "") -> Tensor:
    """Flat indices (int64, ascending) of the ``k`` smallest scores; see :func:`top_k`."""
    return _indices(scores, k, name, largest=False)


def top_k_across(scores: Mapping[str, Tensor], k: int, minimum: int = 1) -> dict[str, Tensor]:
    """Masks of the ``k`` largest scores over all tensors together.

    Args:
        scores: layer name -> scores of any shape; the order settles ties between tensors.
        k: number to select over all tensors.
        minimum: number that every tensor keeps at least (all of it if it is smaller).

    Returns:
        Layer name -> bool tensor; together they hold exactly ``k`` true.

    Raises:
        ValueError: when ``k`` exceeds the number of scores or cannot give every tensor its
            minimum, and for NaN or infinite scores, naming the layer.
    """
    floors = {name: min(minimum, values.numel()) for name, values in scores.items()}
    if k < sum(floors.values()):
        raise ValueError(
            f"k={k} cannot leave at least {minimum} in each of {len(floors)} layers: lower the "
            "sparsity or the minimum"
        )
    pool = dict(scores)
    masks: dict[str, Tensor] = {}
    # A tensor below its minimum stays below it when others are lifted, so its share is final.
    while True:
        chosen = _masks(pool, k, largest=True)
        short = [
            name for name, mask in chosen.items() if int(torch.count_nonzero(mask)) < floors[name]
        ]
        if not short:
            masks.update(chosen)
            return {name: masks[name] for name in scores}
        for name in short:
            masks[name] = top_k(pool.pop(name), floors[name], name=name)
            k -= floors[name]


def select(scores: Tensor, k: int, structure: Structure | None = None, *, name: str = "") -> Tensor:
    """Mask of ``k`` weights that obeys ``structure`` and keeps the best units.

    Args:
        scores: scores of the weights, in the shape of the weight.
        k: active weights, a multiple of ``structure.quantum`` (the fixed count for n:m).
        structure: default unstructured.
        name: layer named in errors.

    Returns:
        Bool tensor of the shape of ``scores`` with exactly ``k`` true.

    Raises:
        ValueError: as :func:`top_k`, and for a shape or count the structure does not allow.
    """
    structure = Unstructured() if structure is None else structure
    shape = tuple(scores.shape)
    structure.check(shape, name)
    if isinstance(structure, Unstructured):
        return top_k(scores, k, name=name)
    check_count(k, scores.numel(), name)
    quantum, fixed = structure.quantum(shape), structure.fixed_count(shape)
    if k % quantum or (fixed is not None and k != fixed):
        allowed = f"exactly {fixed}" if fixed is not None else f"a multiple of {quantum}"
        raise ValueError(f"{in_layer(name)}k={k} must be {allowed} for {structure!r}")
    units = structure.units(scores)
    per_group = k * units.shape[1] // scores.numel()
    return structure.expand(group_top_k(units, per_group, name=name), shape)


def n_m_mask(scores: Tensor, n: int, m: int, *, name: str = "") -> Tensor:
    """Mask that keeps the ``n`` best of every ``m`` consecutive inputs (dimension 1)."""
    structure = NM(n=n, m=m)
    structure.check(tuple(scores.shape), name)
    return structure.expand(group_top_k(structure.units(scores), n, name=name), tuple(scores.shape))


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
    strict, loose = values > threshold, values >= threshold
    crowded = torch.nonzero(loose.sum(1) > k).squeeze(1)
    if crowded.numel():
        tied = loose[crowded] & ~strict[crowded]
        room = k - strict[crowded].sum(1, keepdim=True)
        loose[crowded] = strict[crowded] | (tied & (tied.cumsum(1) <= room))
    return loose


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
        position = values.shape[1] - k
        ordered = np.partition(values.numpy(), position, axis=1)
        return torch.from_numpy(ordered[:, position : position + 1].copy())
    return torch.topk(values, k, dim=1, sorted=False).values.amin(1, keepdim=True)


def _indices(scores: Tensor, k: int, name: str, *, largest: bool) -> Tensor:
    if scores.device.type == "cpu" and scores.numel() > _SMALL and 0 < k <= scores.numel():
        values = comparable(scores).reshape(-1)
        check_finite(values, name)
        found = _few_best(values.numpy(), k, largest)
        if found is not None:
            return torch.from_numpy(found)
    mask = _masks({name: scores}, k, largest=largest)[name].reshape(-1)
    return torch.nonzero(mask).squeeze(1)


def _few_best(values: Array, k: int, largest: bool) -> Array | None:
    """Ascending indices of the `k` best by one pass over the values, or None if the guess failed.

    What is not worse than the guess is kept with its index, and only among that is selected.
    """
    _, guess, _ = _bracket([values], k, values.size, largest)
    _, at_least = _comparisons(largest)

    def good_ones(part: slice) -> Array:
        starts = range(part.start, part.stop, _CHUNK)
        found = [
            np.flatnonzero(at_least(values[start : min(start + _CHUNK, part.stop)], guess)) + start
            for start in starts
        ]
        return np.concatenate(found)

    good = np.concatenate(share_out(good_ones, pieces(values.size, values.size)))
    if not k <= good.size <= values.size // 2:
        return None
    return good[_best([values[good]], k, largest)[0]]


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
        arrays = _best([part.numpy() for part in parts], k, largest)
        chosen = [torch.from_numpy(array) for array in arrays]
    else:
        chosen = _best_on_device(parts, k, largest)
    return {
        name: mask.to(scores[name].device).reshape(scores[name].shape)
        for name, mask in zip(flat, chosen, strict=True)
    }


def _best(parts: Sequence[Array], k: int, largest: bool) -> list[Array]:
    """Masks of the ``k >= 1`` best over the parts; ties to the earlier part, then index."""
    threshold = _threshold(parts, k, largest)
    _, at_least = _comparisons(largest)
    masks = [at_least(part, threshold) for part in parts]
    surplus = sum(int(np.count_nonzero(mask)) for mask in masks) - k
    for part, mask in zip(reversed(parts), reversed(masks), strict=True):
        surplus = _clear_last_ties(part, mask, threshold, surplus)
    return masks


def _clear_last_ties(values: Array, mask: Array, threshold: Any, surplus: int) -> int:
    """Clear up to ``surplus`` ties from the end of ``mask``; return how many are left over."""
    for start in reversed(range(0, values.size, _CHUNK)):
        if surplus == 0:
            break
        here = mask[start : start + _CHUNK]
        tied = values[start : start + _CHUNK] == threshold
        count = int(np.count_nonzero(tied))
        if count <= surplus:
            np.greater(here, tied, out=here)
        else:
            here[np.flatnonzero(tied)[count - surplus :]] = False
        surplus -= min(count, surplus)
    return surplus


def _comparisons(largest: bool) -> tuple[np.ufunc, np.ufunc]:
    return (np.greater, np.greater_equal) if largest else (np.less, np.less_equal)


def _threshold(parts: Sequence[Array], k: int, largest: bool) -> Any:
    """The k-th best value over the parts."""
    total = sum(part.size for part in parts)
    if total <= _SMALL:
        return _partition(np.concatenate(parts), k, largest)
    better, worse, crowded = _bracket(parts, k, total, largest)
    beyond, at_least = _comparisons(largest)
    # Where many scores equal an end of the bracket, its ends are left out: partition is slow on
    # equal values, and whether the threshold is one of the ends is a matter of counting.
    ahead, inside = (at_least, beyond) if crowded else (beyond, at_least)
    before = within = 0
    candidates = []
    for chunk in _chunks(parts):
        outer, inner = ahead(chunk, better), inside(chunk, worse)
        before += int(np.count_nonzero(outer))
        within += int(np.count_nonzero(inner))
        candidates.append(chunk[np.greater(inner, outer)])
    if before < k <= within:
        return _partition(np.concatenate(candidates), k - before, largest)
    if k <= before:
        if crowded and k > sum(int(np.count_nonzero(beyond(part, better))) for part in parts):
            return better
        return _threshold([part[beyond(part, better)] for part in parts], k, largest)
    rest = [np.logical_not(at_least(part, worse)) for part in parts]
    skipped = total - sum(int(np.count_nonzero(mask)) for mask in rest)
    if k <= skipped:
        return worse
    tail = [part[mask] for part, mask in zip(parts, rest, strict=True)]
    return _threshold(tail, k - skipped, largest)


def _bracket(parts: Sequence[Array], k: int, total: int, largest: bool) -> tuple[Any, Any, bool]:
    """Two sampled values that very likely enclose the k-th best; whether many scores equal one."""
    stride = max(total // _SAMPLE, 4) | 1
    sample = np.concatenate([part[::stride] for part in parts])
    share = k / total
    margin = 4.0 * np.sqrt(sample.size * share * (1.0 - share)) + len(parts) + 8.0
    first, last = np.clip(share * sample.size + np.array([-margin, margin]), 0, sample.size - 1)
    if largest:
        first, last = sample.size - 1 - first, sample.size - 1 - last
    sample.partition([int(first), int(last)])
    better, worse = sample[int(first)], sample[int(last)]
    equal = max(np.count_nonzero(sample == better), np.count_nonzero(sample == worse))
    return better, worse, bool(equal > _FEW_TIES)


def _chunks(parts: Sequence[Array]) -> Iterator[Array]:
    for part in parts:
        for start in range(0, part.size, _CHUNK):
            yield part[start : start + _CHUNK]


def _partition(values: Array, k: int, largest: bool) -> Any:
    position = values.size - k if largest else k - 1
    return np.partition(values, position)[position]


def _best_on_device(parts: Sequence[Tensor], k: int, largest: bool) -> list[Tensor]:
    """As :func:`_best`, on the device of the first part, the threshold by ``torch.topk``."""
    values = torch.cat([part.to(parts[0].device) for part in parts])
    best = torch.topk(values, k, largest=largest, sorted=False).values
    threshold = best.amin() if largest else best.amax()
    strict = values > threshold if largest else values < threshold
    ties = torch.nonzero(values == threshold).squeeze(1)
    strict[ties[: k - int(torch.count_nonzero(strict))]] = True
    return list(torch.split_with_sizes(strict, [part.numel() for part in parts]))
