"""A weight held by its non-zeros, as policies see it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sparsetrain._lookup import places, without
from sparsetrain.part import Part
from sparsetrain.random_choice import random_free
from sparsetrain.selection import bottom_k_indices, extreme_indices
from sparsetrain.storage.csr.growth import largest_in_blocks
from sparsetrain.storage.csr.layers import SparseLayer
from sparsetrain.storage.csr.pattern import Pattern, as_matrix, check
from sparsetrain.storage.csr.tape import Tape
from sparsetrain.targets import Exchanged, ExchangeTarget

#: Two ways to sum the same products differ by less.
_ROUNDING = 1e-5


class CsrTarget(ExchangeTarget):
    """The values and the pattern of a `SparseLayer`; gradient and state have the values' size.

    Attributes:
        layer: owns values and pattern.
        built: True for a layer that the user built sparse; it stays one when training ends.
    """

    storage = "csr"

    def __init__(self, name: str, layer: SparseLayer, *, built: bool = False) -> None:
        self.layer = layer
        self.built = built
        super().__init__(name, layer.values)
        self.shape = layer.weight_shape
        self.part = Part(self.shape)
        self.numel = layer.pattern.shape[0] * layer.pattern.shape[1]
        # How the last exchange moved connections: where each was before, and where new ones are.
        self._source = self._at_new = torch.empty(0, dtype=torch.int64)
        self._active_indices: Tensor | None = None
        self._seen: Pattern | None = None

    @property
    def active(self) -> int:
        """Number of non-zeros held."""
        return self.layer.pattern.nnz

    @property
    def mask(self) -> Tensor:
        """Bool tensor of the weight's shape; made at each call, a byte a dense weight."""
        return self.layer.pattern.mask().view(self.shape)

    def active_indices(self) -> Tensor:
        """Flat indices of the active weights, int64, ascending.

        A policy asks several times in an update, so they are kept until the pattern changes.
        """
        if self._active_indices is None or self._seen is not self.layer.pattern:
            self._active_indices, self._seen = self.layer.pattern.flat(), self.layer.pattern
        return self._active_indices

    def at_active(self, tensor: Tensor) -> Tensor:
        """The values' own order is that of the active weights."""
        return tensor

    def least_active(self, count: int) -> Tensor:
        """Flat indices, ascending, of the `count` active weights of least magnitude."""
        places = bottom_k_indices(self.param.detach().abs(), count, name=self.name)
        return self.active_indices()[places]

    def active_values(self, indices: Tensor) -> Tensor:
        """Weights at flat `indices`, which are active."""
        return self.param.detach()[torch.searchsorted(self.active_indices(), indices)]

    def largest_free(self, scores: Tensor, count: int, freed: Tensor) -> Tensor:
        """As the base; `scores` is dense, for policies that keep a dense signal themselves."""
        taken = self.mask
        taken.view(-1)[freed] = False
        return extreme_indices(scores, taken, count, among=False, largest=True, name=self.name)

    def random_free(self, count: int, freed: Tensor, generator: torch.Generator) -> Tensor:
        """Flat indices, ascending, at random among those that are inactive or `freed`."""
        kept = without(self.active_indices(), freed)
        return random_free(self.part, kept, count, generator)

    # The dense gradient, in blocks.

    def watch_gradient(self, wanted: bool) -> None:
        """Keep, or stop keeping, what the dense gradient of the next step is made of."""
        if not wanted:
            if self.layer.tape is not None:
                self.layer.tape.detach()
            self.layer.tape = None
        elif self.layer.tape is None:
            self.layer.tape = Tape()

    @property
    def has_gradient(self) -> bool:
        """Whether a backward pass went through the layer."""
        return self.param.grad is not None

    def whole_gradient(self) -> Tensor | None:
        """The dense gradient, of the weight's shape; None without a backward pass."""
        if not self.has_gradient:
            return None
        gradient = self._rows()(0, self.shape[0])
        # The step may have found the gradient scaled or clipped since; what holds for the active
        # weights holds for all.
        here, mine = gradient.reshape(-1)[self.active_indices()], self.param.grad
        assert mine is not None
        scale = float((here @ mine) / (here @ here)) if here.any() else 1.0
        if math.isfinite(scale) and abs(scale - 1.0) > _ROUNDING:
            gradient.mul_(scale)
        return gradient.view(self.shape)

    def steepest_free(self, count: int, freed: Tensor) -> Tensor:
        """As `largest_free` by the dense gradient, a block of rows at a time."""
        pattern = self.layer.pattern
        taken = without(self.active_indices(), freed)
        return largest_in_blocks(self._rows(), pattern.shape, count, taken, self.name)

    def _rows(self) -> Callable[[int, int], Tensor]:
        """(start, stop) -> those rows of the dense gradient."""
        tape = self.layer.tape
        if tape is not None:
            tape.settle(self.param.grad)
            if tape.factors:
                return tape.rows
        if tape is None or self.param.grad is None or self.param.grad.any():
            raise ValueError(
                f"csr storage did not keep the gradient of inactive weights of {self.name}: it "
                "does so at steps whose update is due; before a forced update call "
                "optimizer.expect_update() ahead of backward()"
            )
        width = self.layer.pattern.shape[1]
        return lambda start, stop: self.param.new_zeros(stop - start, width)

    # Changing the pattern.

    def exchange(self, dropped: Tensor, grown: Tensor, values: Tensor | None = None) -> Exchanged:
        """Drop and grow connections; those in both sets stay as they are."""
        active = self.active_indices()
        stays = torch.ones(active.numel(), dtype=torch.bool)
        stays[places(active, dropped)] = False
        order = torch.arange(grown.numel())
        if (grown[1:] < grown[:-1]).any():
            grown, order = grown.sort()
        place = places(active, grown)
        was_active = torch.zeros_like(grown, dtype=torch.bool)
        inside = place < active.numel()
        was_active[inside] = active[place[inside]] == grown[inside]
        stays[place[was_active]] = True
        is_new = ~was_active
        new = grown[is_new]
        starts = None if values is None else values[order[is_new]]
        self._rebuild(active, stays, new, place[is_new], starts)
        gone = active[~stays]
        return Exchanged(gone, new, gone.numel(), new.numel())

    def _rebuild(
        self, active: Tensor, stays: Tensor, new: Tensor, place: Tensor, starts: Tensor | None
    ) -> None:
        """Install a new pattern, and remember how to carry tensors over to it.

        Args:
            stays: which of the `active` connections stay.
            new: flat indices to add, ascending.
            place: where each of them would be inserted into `active`.
            starts: their values, 0 when None.
        """
        kept_before = torch.cat([torch.zeros(1, dtype=torch.int64), stays.cumsum(0)])
        survivors = stays.nonzero().view(-1)
        self._at_new = kept_before[place] + torch.arange(new.numel())
        is_kept = torch.ones(survivors.numel() + new.numel(), dtype=torch.bool)
        is_kept[self._at_new] = False
        # For a new connection any place will do; what is there is overwritten.
        rank = is_kept.cumsum(0).sub_(1).clamp_(min=0)
        self._source = survivors[rank] if survivors.numel() else torch.zeros_like(rank)
        flat = self._carried(active)
        flat[self._at_new] = new
        values = self.renewed(self.param.detach(), new, new, 0.0)
        if starts is not None:
            values[self._at_new] = starts
        gradient = self.param.grad
        self.layer.hold(values, Pattern.of(flat, self.layer.pattern.shape), self.shape)
        self._active_indices = None
        self.param = self.layer.values
        if gradient is not None:
            self.param.grad = self.renewed(gradient, new, new, 0.0)

    def _carried(self, tensor: Tensor) -> Tensor:
        if tensor.numel() == 0:
            return tensor.new_zeros(self._source.numel())
        return tensor.index_select(0, self._source)

    def renewed(self, tensor: Tensor, gone: Tensor, new: Tensor, fresh: float) -> Tensor:
        """A tensor of one number a value, carried along with the last exchange."""
        moved = self._carried(tensor)
        moved[self._at_new] = fresh
        return moved

    def replace_mask(self, mask: Tensor) -> tuple[int, int]:
        """Install a whole new mask; returns how many weights were dropped and grown."""
        flat = mask.reshape(-1).nonzero().view(-1)
        done = self.exchange(self.active_indices(), flat)
        return done.dropped, done.grown

    def release(self) -> None:
        """Stop watching the gradient."""
        self.watch_gradient(False)

    # Checkpoints.

    def describe(self) -> dict[str, Tensor]:
        """The pattern; values are in the model's state dict."""
        pattern = self.layer.pattern
        return {"row_pointers": pattern.pointers, "columns": pattern.columns}

    def check_entry(self, entry: Mapping[str, Any]) -> None:
        """Nothing beside the pattern, which `check_pattern_entry` looks at."""

    def restore_entry(self, entry: Mapping[str, Any]) -> None:
        """Nothing is left to do after `take_pattern`, which comes before the optimizer's state."""

    def take_pattern(self, entry: Mapping[str, Any]) -> Exchanged:
        """Take the pattern of a checkpoint, as an exchange that keeps what is in both."""
        pattern = Pattern(self.layer.pattern.shape, entry["row_pointers"], entry["columns"])
        return self.exchange(self.active_indices(), pattern.flat())


def check_pattern_entry(name: str, shape: tuple[int, ...], entry: Mapping[str, Any]) -> None:
    """Refuse a checkpoint's pattern that does not fit a weight of `shape`."""
    pointers, columns = entry.get("row_pointers"), entry.get("columns")
    if not isinstance(pointers, Tensor) or not isinstance(columns, Tensor):
        raise ValueError(f"the pattern of {name} is missing")
    try:
        check(as_matrix(shape), pointers, columns)
    except ValueError as error:
        raise ValueError(f"in the pattern of {name}, {error}") from error
