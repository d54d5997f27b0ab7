"""The one drop/grow engine: policies differ only in what they drop by and what they grow by.

For unstructured sparsity everything is an index set, so the engine serves any storage. A kept
connection cannot be grown again; one that was dropped a moment ago can, and then keeps its value
and its optimizer state (as in the authors' code of RigL and SET).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sparsetrain.policies.group import TargetGroup
from sparsetrain.selection import bottom_k_indices, group_top_k, top_k_indices
from sparsetrain.storage.masked import MaskedTarget
from sparsetrain.structures import Structure, Unstructured

#: (kept flat indices, number to grow) -> flat indices to grow, none of them kept.
Grower = Callable[[Tensor, int], Tensor]


def drop_smallest(scores: Tensor, active: Tensor, count: int, name: str) -> tuple[Tensor, Tensor]:
    """Split the active indices into the `count` with the smallest scores and the rest.

    Args:
        scores: of the active weights, shape [active].
        active: their flat indices, shape [active], ascending.

    Returns:
        (dropped, kept) flat indices, both ascending.
    """
    return split(active, bottom_k_indices(scores, count, name=name))


def split(active: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Split `active` into the entries at `positions` and the others, order kept."""
    keep = torch.ones(active.numel(), dtype=torch.bool, device=active.device)
    keep[positions] = False
    return active[positions], active[keep]


def grow_by_score(scores: Tensor, name: str) -> Grower:
    """Grow where non-negative `scores` (of the weight's shape; overwritten) are largest.

    Raises:
        ValueError: from the grower, naming the layer, when a score is NaN or infinite.
    """
    flat = scores.reshape(-1)

    def grow(kept: Tensor, count: int) -> Tensor:
        flat[kept] = -1.0
        return top_k_indices(flat, count, name=name)

    return grow


def grow_randomly(numel: int, generator: torch.Generator) -> Grower:
    """Grow uniformly at random among all connections that are not kept."""

    def grow(kept: Tensor, count: int) -> Tensor:
        free = numel - kept.numel()
        ranks = random_ranks(free, count, generator).to(kept.device)
        # The r-th free index is r plus the number of kept indices before it.
        before = kept - torch.arange(kept.numel(), device=kept.device)
        return ranks + torch.searchsorted(before, ranks, right=True)

    return grow


def random_ranks(population: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` distinct integers below `population`, uniformly at random, ascending."""
    if count > population:
        raise ValueError(f"cannot choose {count} of {population} connections")
    if 4 * count >= population:
        return torch.randperm(population, generator=generator)[:count].sort().values
    draws = np.empty(0, dtype=np.int64)
    while True:  # more than 3/4 of the draws are new, so this ends after a round or two
        more = torch.randint(population, (count + count // 8 + 16,), generator=generator)
        draws = np.concatenate([draws, more.numpy()])
        values, first = np.unique(draws, return_index=True)
        if values.size >= count:
            chosen = values[np.argsort(first, kind="stable")[:count]]
            return torch.from_numpy(np.sort(chosen))


def drop_and_grow(
    group: TargetGroup,
    target: MaskedTarget,
    fraction: float,
    active: Tensor,
    drop_scores: Tensor,
    grower: Grower,
) -> None:
    """Replace `int(fraction * active)` connections of an unstructured target.

    Args:
        active: flat indices of the active weights, shape [active], ascending.
        drop_scores: importance of the active weights, shape [active]; the smallest are dropped.
        grower: chooses where to grow.
    """
    count = int(target.active * fraction)
    dropped, kept = drop_smallest(drop_scores, active, count, target.name)
    group.exchange(target, dropped, grower(kept, count))


def drop_and_grow_units(
    group: TargetGroup,
    target: MaskedTarget,
    fraction: float,
    drop_scores: Tensor,
    grow_scores: Tensor,
    structure: Structure,
) -> None:
    """The same for structured sparsity: units (blocks, inputs of a row) compete in their groups.

    Args:
        drop_scores: importance of every weight, non-negative, of the weight's shape.
        grow_scores: wish to grow every weight, non-negative, of the weight's shape.
    """
    name, mask = target.name, target.mask
    active = structure.units(mask.float()) > 0
    in_group = int(active[0].sum())
    keep = in_group - int(in_group * fraction)
    kept = group_top_k(structure.units(drop_scores).masked_fill(~active, -1.0), keep, name=name)
    wish = structure.units(grow_scores).masked_fill(kept, -1.0)
    grown = group_top_k(wish, in_group - keep, name=name)
    new = structure.expand(kept | grown, target.shape)
    group.exchange(target, flat_indices(mask & ~new), flat_indices(new & ~mask))


def is_unstructured(structure: Structure) -> bool:
    """Whether every weight stands for itself."""
    return isinstance(structure, Unstructured)


def flat_indices(mask: Tensor) -> Tensor:
    """Flat indices of True, ascending."""
    return mask.reshape(-1).nonzero().view(-1)
