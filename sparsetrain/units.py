"""Weights seen as the units of a structure, also where their rows are shared out over ranks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsetrain.part import Part
from sparsetrain.structures import Block, Structure


def to_units(structure: Structure, scores: Tensor, part: Part) -> Tensor:
    """Scores of the units, `[groups, units]`.

    Units and groups that lie within rows (n:m, constant fan-in) are those of the rows that are
    here. Blocks compete over the whole weight and may lie across two shards, so their scores are
    added up over ranks: every rank has all of them, a number a block.

    Args:
        scores: of the part that is here.
    """
    if part.is_whole or not isinstance(structure, Block):
        return structure.units(scores)
    rows, columns = structure.size
    width = scores.shape[1:].numel() // columns
    above = part.first_row % rows
    below = -(above + scores.shape[0]) % rows
    matrix = F.pad(scores.reshape(scores.shape[0], columns_of(part)), (0, 0, above, below))
    units = torch.zeros(part.shape[0] // rows * width, dtype=torch.float32)
    if scores.shape[0]:
        here = structure.units(matrix).reshape(-1)
        first = part.first_row // rows * width
        units[first : first + here.numel()] = here
    return part.sum(units).to(scores.device).reshape(1, -1)


def from_units(structure: Structure, unit_mask: Tensor, part: Part) -> Tensor:
    """Mask of the part that is here, from a mask over the units of `to_units`."""
    if part.is_whole or isinstance(structure, Block):
        return part.held(structure.expand(unit_mask, part.shape))
    return structure.expand(unit_mask, part.held_shape)


def columns_of(part: Part) -> int:
    """Weights in a row."""
    return torch.Size(part.shape[1:]).numel()
