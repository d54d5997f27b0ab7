"""Learned masks of weights whose rows are shared out over ranks.

The gates are sharded as any parameter is. What is computed beside the forward pass (penalties,
borders, counts) is computed on what a rank has, by a copy of the mask whose gates and weight are
the local shards; the copy shares their memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from sparsetrain.learned.base import LearnedMask
from sparsetrain.learned.sharing import Shape, Sharing
from sparsetrain.part import Part, part_of


@dataclass(frozen=True)
class _OfShard(Sharing):
    """Of the rows that are here, gates that are shared out as the rows are."""

    weights_a_gate: int = 1

    @property
    def size(self) -> int:
        """Weights that share a gate, also on a rank that has none."""
        return self.weights_a_gate

    @property
    def is_single(self) -> bool:
        """Whether every weight has a gate of its own."""
        return self.weights_a_gate == 1


@dataclass(frozen=True)
class _RowsOf(Sharing):
    """Of the rows that are here, but with the gates of the whole weight."""

    first: int = 0
    rows: int = 0

    def cut(self, weights: Tensor) -> Tensor:
        """The rows that are here."""
        return weights[self.first : self.first + self.rows]

    def times(self, weight: Tensor, gates: Tensor) -> Tensor:
        """The rows that are here with each gate multiplied in."""
        return weight * self.spread(gates)

    def spread(self, gates: Tensor) -> Tensor:
        """One entry a weight that is here."""
        return self.cut(super().spread(gates))


class GateShards:
    """The gates of one sharded weight.

    Args:
        learned: the mask in the model.
        part: of the weight that is here.
    """

    def __init__(self, name: str, learned: LearnedMask, part: Part) -> None:
        self._learned = learned
        self._part = part
        self.parts = {key: part_of(f"{name} ({key})", gate) for key, gate in _gates(learned)}

    @property
    def part(self) -> Part:
        """Of the gates that are here, as `of_rows` has them."""
        part = next(iter(self.parts.values()))
        return part if self.follow_rows else Part(part.shape)

    @property
    def follow_rows(self) -> bool:
        """Whether every rank has the gates of its rows, and no others."""
        rows, ranks = self._part.shape[0], self._part.ranks
        return all(_follow(part.shape[0], rows, ranks) for part in self.parts.values())

    def sharded(self) -> LearnedMask:
        """The mask with the gates that are here; what changes them changes those in the model."""
        here = {}
        for key, gate in _gates(self._learned):
            part = self.parts[key]
            here[key] = Parameter(part.held(gate), requires_grad=gate.requires_grad)
            if gate.grad is not None:
                here[key].grad = part.held(gate.grad)
        return self._copy(here, self._sharing_here())

    def keep_gradients(self, sharded: LearnedMask) -> None:
        """Give the gates in the model the gradients of those here, where they had none."""
        here = dict(_gates(sharded))
        for key, gate in _gates(self._learned):
            gradient = here[key].grad
            if gate.grad is None and gradient is not None:
                gate.grad = self.parts[key].wrap(gradient)

    def take_back(self, mask: LearnedMask) -> None:
        """Give the gates in the model what a mask from `of_rows` has made of its own."""
        if not self.follow_rows:
            whole = dict(_gates(mask))
            for key, gate in _gates(self._learned):
                part = self.parts[key]
                part.held(gate).copy_(part.held(whole[key]))

    def of_rows(self) -> LearnedMask:
        """The mask with all gates that the rows here need."""
        if self.follow_rows:
            return self.sharded()
        whole = {key: _whole(gate) for key, gate in _gates(self._learned)}
        sharing = self._learned.sharing
        first, rows = self._part.first_row, self._part.held_shape[0]
        rows_of = _RowsOf(sharing.shape, sharing.view, sharing.gates, first, rows)
        return self._copy(whole, rows_of)

    def _sharing_here(self) -> Sharing:
        sharing = self._learned.sharing
        if not self.follow_rows:
            return _OfShard(sharing.shape, sharing.view, sharing.gates, sharing.size)
        rows, held = self._part.shape[0], self._part.held_shape[0]

        def here(shape: Shape) -> Shape:
            return (shape[0] * held // rows, *shape[1:])

        shape, view, gates = (here(s) for s in (sharing.shape, sharing.view, sharing.gates))
        return _OfShard(shape, view, gates, sharing.size)

    def _copy(self, gates: Mapping[str, Parameter], sharing: Sharing) -> LearnedMask:
        learned = self._learned
        twin = object.__new__(type(learned))
        twin.__dict__.update(learned.__dict__)
        twin._parameters = dict(gates)
        twin._buffers = dict(learned._buffers)
        if isinstance(sharing, _OfShard):
            for buffer, gate in learned.gate_buffers.items():
                whole = learned._buffers[buffer]
                assert whole is not None
                twin._buffers[buffer] = self.parts[gate].held(whole)
        twin.sharing = sharing
        return twin


def _gates(learned: LearnedMask) -> list[tuple[str, Parameter]]:
    return list(learned.named_parameters(recurse=False))


def _follow(gate_rows: int, rows: int, ranks: int) -> bool:
    """Whether so many rows of gates are shared out as the rows of the weight are."""
    if gate_rows == rows:
        return True
    more, less = max(gate_rows, rows), min(gate_rows, rows)
    return more % less == 0 and less % ranks == 0


@torch.no_grad()
def _whole(gate: Parameter) -> Parameter:
    """All gates on every rank; they are few where they do not follow the rows."""
    return Parameter(gate.full_tensor(), requires_grad=False)  # type: ignore[attr-defined]
