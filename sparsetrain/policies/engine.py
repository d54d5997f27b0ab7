"""The one drop/grow engine: policies differ only in what they drop by and what they grow by.

For unstructured sparsity everything is an index set, asked of the target, so the engine serves any
storage. A kept connection cannot be grown again; one that was dropped a moment ago can, and then
keeps its value and its optimizer state (as in the authors' code of RigL and SET).
"""

from __future__ import annotations

from torch import Tensor

from sparsetrain.policies.group import TargetGroup
from sparsetrain.selection import unit_top_k
from sparsetrain.structures import Structure, Unstructured
from sparsetrain.targets import ExchangeTarget
from sparsetrain.units import from_units, to_units


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
        drop_scores: importance of every weight that is held here, non-negative.
        grow_scores: wish to grow every weight that is held here, non-negative.
    """
    mask, part = target.held_mask, target.part

    def best(units: Tensor, out: Tensor, count: int) -> Tensor:
        units = units.masked_fill(out, -1.0)
        return unit_top_k(units, count, structure, part, name=target.name)

    active = to_units(structure, mask.float(), part) > 0
    in_group = target.active * active.shape[1] // target.numel
    keep = in_group - int(in_group * fraction)
    kept = best(to_units(structure, drop_scores, part), ~active, keep)
    grown = best(to_units(structure, grow_scores, part), kept, in_group - keep)
    new = from_units(structure, kept | grown, part)
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
