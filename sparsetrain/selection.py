"""From scores and a count to a mask that holds exactly that many.

Everything here is exact and deterministic: of equal scores the one at the lower flat index wins
(across tensors, the earlier tensor), as a stable sort would have it. Nothing is sorted.

Scores may have any floating dtype (half precisions are compared in float32, integers in float64)
and must be finite.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from sparsetrain._comparable import check_count, check_finite, comparable, in_layer
from sparsetrain._threads import pieces, share_out
from sparsetrain._threshold import SMALL, Array, best, few_best, few_best_where, larger
from sparsetrain.structures import NM, Structure, Unstructured

# Values that are partitioned together, row by row, in the cache.
_CHUNK = 1 << 17


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


def above(values: Tensor, bar: Tensor) -> Tensor:
    """Indices (int64, ascending) of the entries of a vector that are larger than ``bar``."""
    return torch.from_numpy(larger(values.numpy(), bar.item()))


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


def _indices(scores: Tensor, k: int, name: str, *, largest: bool) -> Tensor:
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
    values: Tensor, mask: Tensor, k: int, *, among: bool, largest: bool, name: str = ""
) -> Tensor:
    """Flat indices of the ``k`` largest or smallest absolute values where ``mask`` is ``among``.

    The same as selecting from the list of those entries, without making that list.

    Args:
        values: any shape, finite where ``mask`` is ``among``.
        mask: bool, of the shape of ``values``.

    Returns:
        int64, ascending. Of equal values the one at the lower index is taken.

    Raises:
        ValueError: for a ``k`` out of range and for NaN or infinite values.
    """
    if _suits_one_pass(values, k):
        flat, flags = comparable(values).reshape(-1), mask.reshape(-1)
        if torch.isfinite(flat.sum()):  # else the slower way below finds out which are not
            found = few_best_where(flat.numpy(), flags.numpy(), k, among, largest)
            if found is not None:
                return torch.from_numpy(found)
    eligible = (mask if among else ~mask).reshape(-1).nonzero().squeeze(1)
    return eligible[_indices(values.reshape(-1)[eligible].abs(), k, name, largest=largest)]


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
