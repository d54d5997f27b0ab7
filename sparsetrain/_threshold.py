"""Exact thresholds of large numpy arrays without sorting: the engine below selection.

A strided sample brackets the threshold, a few vectorised passes count what lies outside the
bracket, and only the candidates inside are partitioned. A bracket that misses costs time, never
correctness. Values are finite, of one floating dtype.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsetrain._threads import pieces, share_out

Array = NDArray[Any]

SMALL = 1 << 14
_SAMPLE = 1 << 16
_SMALL_SAMPLE = 1 << 14
_LEAST_SAMPLE = 256
_FEW_TIES = 16
# Chunks stay in the cache between the passes over them.
_CHUNK = 1 << 18


def few_best(values: Array, k: int, largest: bool) -> Array | None:
    """Ascending indices of the `k` best by one pass over the values, or None if the guess failed.

    What is not worse than the guess is kept with its index, and only among that is selected.
    """
    _, guess, _ = _bracket([values], k, values.size, largest)
    _, at_least = _comparisons(largest)

    def good_ones(chunk: slice) -> Array:
        return np.flatnonzero(at_least(values[chunk], guess))

    good = _gather(good_ones, values.size)
    if not k <= good.size <= values.size // 2:
        return None
    return good[best([values[good]], k, largest)[0]]


def larger(values: Array, bar: float) -> Array:
    """Ascending indices of the values above `bar`."""
    limit = values.dtype.type(bar)
    return _gather(lambda chunk: np.flatnonzero(values[chunk] > limit), values.size)


def no_less(values: Array, bar: float) -> Array:
    """Ascending indices of the values that are `bar` or above."""
    limit = values.dtype.type(bar)
    return _gather(lambda chunk: np.flatnonzero(values[chunk] >= limit), values.size)


def few_best_where(values: Array, mask: Array, k: int, among: bool, largest: bool) -> Array | None:
    """As :func:`few_best` for the absolute values where the mask is `among`."""
    stride = max(values.size // _SMALL_SAMPLE, 4) | 1
    sample = np.abs(values[::stride][mask[::stride] == among])
    eligible = int(np.count_nonzero(mask))
    eligible = eligible if among else mask.size - eligible
    if sample.size < _LEAST_SAMPLE or k > eligible:
        return None
    guess = quantiles(sample, k / eligible, largest)[1]
    _, at_least = _comparisons(largest)
    # Of two flags: both, or the first alone.
    restrict: np.ufunc = np.logical_and if among else np.greater

    def good_ones(chunk: slice) -> Array:
        good = at_least(np.abs(values[chunk]), guess)
        return np.flatnonzero(restrict(good, mask[chunk], out=good))

    good = _gather(good_ones, values.size)
    if good.size < k:
        return None
    return good[best([np.abs(values[good])], k, largest)[0]]


def _gather(good_ones: Callable[[slice], Array], size: int) -> Array:
    """Indices that `good_ones` finds in chunks of `size` values, ascending."""

    def of(part: slice) -> Array:
        starts = range(part.start, part.stop, _CHUNK)
        chunks = [slice(start, min(start + _CHUNK, part.stop)) for start in starts]
        return np.concatenate([good_ones(chunk) + chunk.start for chunk in chunks])

    return np.concatenate(share_out(of, pieces(size)))


def best(parts: Sequence[Array], k: int, largest: bool) -> list[Array]:
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
    if total <= SMALL:
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
    better, worse = quantiles(sample, k / total, largest, len(parts))
    equal = max(np.count_nonzero(sample == better), np.count_nonzero(sample == worse))
    return better, worse, bool(equal > _FEW_TIES)


def quantiles(sample: Array, share: float, largest: bool, parts: int = 1) -> tuple[Any, Any]:
    """Values of the sample (partitioned in place) four deviations to either side of `share`."""
    margin = 4.0 * np.sqrt(sample.size * share * (1.0 - share)) + parts + 8.0
    first, last = np.clip(share * sample.size + np.array([-margin, margin]), 0, sample.size - 1)
    if largest:
        first, last = sample.size - 1 - first, sample.size - 1 - last
    sample.partition([int(first), int(last)])
    return sample[int(first)], sample[int(last)]


def _chunks(parts: Sequence[Array]) -> Iterator[Array]:
    for part in parts:
        for start in range(0, part.size, _CHUNK):
            yield part[start : start + _CHUNK]


def _partition(values: Array, k: int, largest: bool) -> Any:
    position = values.size - k if largest else k - 1
    return np.partition(values, position)[position]
