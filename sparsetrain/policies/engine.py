"""The one drop/grow engine: policies differ only in what they drop by and what they grow by.

For unstructured sparsity everything is an index set, asked of the target, so the engine serves any
storage. A kept connection cannot be grown again; one that was dropped a moment ago can, and then
keeps its value and its optimizer state (as in the authors' code of RigL and SET).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain._lookup import places
from sparsetrain.policies.group import TargetGroup
from sparsetrain.random_choice import random_ranks
from sparsetrain.selection import group_top_k
from sparsetrain.structures import Structure, Unstructured
from sparsetrain.targets import ExchangeTarget


def random_free(numel: int, kept: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` flat indices below `numel`, uniformly at random among those not in `kept`.

    Args:
        kept: ascending.
        generator: CPU random source.
    """
    ranks = random_ranks(numel - kept.numel(), count, generator).to(kept.device)
    # The r-th free index is r plus the number of kept indices before it.
    before = kept - torch.arange(kept.numel(), device=kept.device)
    return ranks + places(before, ranks + 1)


def drop_and_grow_units(
    group: TargetGroup,
    target: ExchangeTarget,
    fraction: float,
    drop_scores: Tensor,
    grow_scores: Tensor,
    structure: Structure,
) -> None:
    """Drop and grow with structured sparsity: units (blocks, inputs of a row) compete in groups.

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


def obeys(structure: Structure, mask: Tensor) -> bool:
    """Whether a mask is made of whole units, of the same number in every group."""
    if is_unstructured(structure):
        return True
    shape = tuple(mask.shape)
    units = structure.units(mask.float()) > 0
    in_group = units.sum(1)
    is_whole = structure.expand(units, shape).equal(mask) and bool((in_group == in_group[0]).all())
    return is_whole and structure.fixed_count(shape) in (None, int(mask.sum()))


def flat_indices(mask: Tensor) -> Tensor:
    """Flat indices of True, ascending."""
    return mask.reshape(-1).nonzero().view(-1)
