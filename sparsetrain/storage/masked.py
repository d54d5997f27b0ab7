"""Masked-dense storage: the weight stays a dense parameter whose inactive entries are 0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from sparsetrain._lookup import without
from sparsetrain.part import Part
from sparsetrain.random_choice import random_free
from sparsetrain.selection import extreme_indices
from sparsetrain.storage.bits import pack_rows, packed_shape, unpack_rows
from sparsetrain.storage.kernels import (
    first_unset,
    is_set_at,
    keep_where_,
    read_flat,
    write_flat_,
)
from sparsetrain.targets import Exchanged, ExchangeTarget


class MaskedTarget(ExchangeTarget):
    """A dense parameter and one bool a weight; inactive weights and gradients are exactly 0.

    Of a sharded parameter only what is held here is touched.
    """

    storage = "masked"
    holds_zeros = True

    def __init__(self, name: str, param: Parameter) -> None:
        super().__init__(name, param)
        weight = self.weight()
        self._mask = torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
        self._active = self.numel
        self._seen_version = -1
        self._sample: tuple[int, ...] | None = None
        self._original: Tensor | None = None

    def weight(self) -> Tensor:
        """What is held here of the weight, without its history; shares memory."""
        return self.part.held(self.param)

    def gradient(self) -> Tensor | None:
        """The gradient of what is held here."""
        grad = self.param.grad
        return None if grad is None else self.part.held(grad)

    @property
    def active(self) -> int:
        """Number of active weights."""
        return self._active

    @property
    def mask(self) -> Tensor:
        """Bool tensor of the weight's shape, True where the weight is active."""
        return self.part.wrap(self._mask)

    @property
    def held_mask(self) -> Tensor:
        """The mask of the weights that are held here."""
        return self._mask

    def at_active(self, tensor: Tensor) -> Tensor:
        """Entries at the active weights, in the order of `active_indices`."""
        return self.part.held(tensor).reshape(-1)[self.active_indices()]

    def active_values(self, indices: Tensor) -> Tensor:
        """Weights at flat `indices`, as they stand in the forward pass."""
        return read_flat(self.weight(), indices)

    def least_active(self, count: int) -> Tensor:
        """Flat indices, ascending, of the `count` active weights of least magnitude."""
        return self._extreme(self.weight(), self._mask, count, among=True, largest=False)

    def largest_free(self, scores: Tensor, count: int, freed: Tensor) -> Tensor:
        """Flat indices, ascending, of the `count` largest |scores| where inactive or `freed`."""
        taken = self._mask.clone()
        taken.view(-1)[freed] = False
        return self._extreme(self.part.held(scores), taken, count, among=False, largest=True)

    def _extreme(
        self, values: Tensor, mask: Tensor, count: int, *, among: bool, largest: bool
    ) -> Tensor:
        return extreme_indices(
            values, mask, count, among=among, largest=largest, name=self.name, part=self.part
        )

    def random_free(self, count: int, freed: Tensor, generator: torch.Generator) -> Tensor:
        """Flat indices, ascending, at random among those that are inactive or `freed`."""
        kept = without(self.active_indices(), freed)
        return random_free(self.part, kept, count, generator)

    @property
    def has_gradient(self) -> bool:
        """Whether the last backward pass reached the weight."""
        return self.param.grad is not None

    def whole_gradient(self) -> Tensor | None:
        """The dense gradient, which the parameter has anyway."""
        return None if self.param.grad is None else self.param.grad.detach()

    def steepest_free(self, count: int, freed: Tensor) -> Tensor:
        """As `largest_free`, by the dense gradient."""
        gradient = self.whole_gradient()
        if gradient is None:
            raise ValueError(f"{self.name} has no gradient: call backward() before the update")
        return self.largest_free(gradient, count, freed)

    def follow(self, param: Parameter) -> None:
        """Go on with a parameter that has taken the place of the whole one and is sharded."""
        super().follow(param)
        self._mask = self.part.held(self._mask).clone()
        if self._original is not None:
            self._original = self.part.held(self._original).clone()
        self._seen_version, self._sample = -1, None

    def begin(self, mask: Tensor) -> None:
        """Install the first mask. The dense weights are remembered until the first step.

        A run may be resumed by loading the model, wrapping it and then loading the optimizer;
        the random masks of the wrapping must not cost weights that the loaded masks keep.
        """
        original = self.weight().clone()
        self.replace_mask(mask)
        self._original = original

    def replace_mask(self, mask: Tensor) -> tuple[int, int]:
        """Install a new mask of what is here; returns how many weights were dropped and grown."""
        mask = mask.to(self._mask.device, torch.bool)
        here = int((mask & ~self._mask).sum()), int(mask.sum())
        grown, active = self.part.totals(*here)
        dropped = self.active + grown - active
        self._mask = mask.contiguous()
        self._active = active
        self.mask_weight()
        return dropped, grown

    def exchange(self, dropped: Tensor, grown: Tensor, values: Tensor | None = None) -> Exchanged:
        """Drop and grow connections; those in both sets stay as they are."""
        flat = self._mask.view(-1)
        fresh = ~flat[grown]
        flat[dropped] = False
        flat[grown] = True
        gone = dropped[~flat[dropped]]
        new = grown[fresh]
        less, more = self.part.totals(gone.numel(), new.numel())
        self._active += more - less
        self._write_exchanged(gone, new, None if values is None else values[fresh])
        return Exchanged(gone, new, less, more)

    def renewed(self, tensor: Tensor, gone: Tensor, new: Tensor, fresh: float) -> Tensor:
        """Optimizer state with 0 where a weight went and `fresh` where one is new, in place."""
        here = self.part.held(tensor)
        write_flat_(here, gone, 0.0)
        write_flat_(here, new, fresh)
        return tensor

    def _write_exchanged(self, gone: Tensor, new: Tensor, values: Tensor | None) -> None:
        weight = self.weight()
        write_flat_(weight, gone, 0.0)
        write_flat_(weight, new, 0.0 if values is None else values)
        self._seen_version = weight._version

    def why_not_narrowed(self) -> str:
        """Nothing stands against it, if all of the weight is here."""
        return "" if self.part.is_whole else "sharded over ranks"

    def take(self, dim: int, keep: Tensor) -> None:
        """Follow the parameter, of which nothing but `keep` is left along `dim`."""
        self._mask = slices(self._mask, dim, keep)
        self._active = int(self._mask.sum())
        if self._original is not None:
            self._original = slices(self._original, dim, keep)
        self.part = Part(tuple(self._mask.shape))
        self.shape, self.numel = self.part.shape, self._mask.numel()
        self._sample = None

    def mask_gradient(self) -> None:
        """Set the gradient to 0 where inactive (also where it is NaN or infinite)."""
        grad = self.gradient()
        if grad is not None and self._active < self.numel:
            self.follow_device()
            keep_where_(grad, self._mask)

    def mask_state(self, tensor: Tensor) -> None:
        """Set optimizer state to 0 where inactive."""
        keep_where_(self.part.held(tensor), self._mask)

    def check_gradient(self) -> None:
        """Refuse a gradient that is not held densely."""
        grad = self.param.grad
        if grad is not None and grad.layout != torch.strided:
            raise ValueError(
                f"{self.name} has a sparse-layout gradient; build its layer with sparse=False "
                "or keep it dense with a rule"
            )

    def mask_weight(self) -> None:
        """Set the weight to 0 where inactive."""
        self.follow_device()
        weight = self.weight()
        keep_where_(weight, self._mask)
        self._seen_version = weight._version

    def follow_device(self) -> None:
        """Take what is kept for the weight to the device that it is on."""
        device = self.weight().device
        if self._mask.device != device:
            self._mask = self._mask.to(device)
            self._original = None if self._original is None else self._original.to(device)

    def before_step(self) -> None:
        """Get ready for the base optimizer: repair outside writes, then mask the gradient."""
        self.check_outside_writes()
        self.mask_gradient()

    def check_outside_writes(self) -> None:
        """Follow the weight to its device, and mask it again if somebody else wrote to it."""
        self._original = None
        self.follow_device()
        weight = self.weight()
        # Loading a state dict, for one, writes dense weights behind our back.
        if weight._version != self._seen_version or self._sample_is_set(weight):
            self.mask_weight()

    def _sample_is_set(self, weight: Tensor) -> bool:
        """Whether one inactive weight, looked at as a sample, is not 0.

        Writes through `.data` are not counted by torch, and a pass over all weights is dear.
        """
        if self.active == self.numel:
            return False
        if self._mask.device.type != "cpu":
            return True  # there a look costs more than a pass
        if self._sample is None or is_set_at(self._mask, self._sample):
            self._sample = first_unset(self._mask)
        return self._sample is not None and is_set_at(weight, self._sample)

    def after_step(self, keeps_zeros: bool) -> None:
        """Leave exact zeros behind; free when the base optimizer keeps them itself."""
        if not keeps_zeros:
            self.mask_weight()
        self._seen_version = self.weight()._version

    def extra_state(self) -> dict[str, Tensor]:
        """What a checkpoint needs beside the mask, of the weight's shape."""
        return {}

    def describe(self) -> dict[str, Any]:
        """The mask, one bit a weight, and the extra state."""
        return {"mask": self.part.wrap(pack_rows(self._mask)), **self.extra_state()}

    def check_entry(self, entry: Mapping[str, Any]) -> None:
        """Refuse an extra state that is not whole."""
        for key, mine in self.extra_state().items():
            value = entry.get(key)
            if not isinstance(value, Tensor) or value.shape != mine.shape:
                raise ValueError(f"the {key} weight of {self.name} is not whole")

    def restore_entry(self, entry: Mapping[str, Any]) -> None:
        """Take the mask and the extra state of a checkpoint."""
        packed = self.part.held(entry["mask"])
        self.restore(unpack_rows(packed, self.part.held_shape), dict(entry))

    def restore(self, mask: Tensor, state: dict[str, Any]) -> None:
        """Take the mask and the extra state of a checkpoint.

        Until the first step the weights that masks have hidden are remembered, as in `begin`: a
        loop may load the model, give the optimizer its own state back (Accelerate does), and only
        then load the optimizer.
        """
        self.follow_device()
        if self._original is not None:
            weight = self.weight()
            if torch.equal(weight, torch.where(self._mask, self._original, 0.0)):
                weight.copy_(self._original)
            else:  # a checkpoint was written over it since
                self._original = weight.clone()
        self._mask = mask.to(self._mask.device)
        self._active = self.total(int(mask.sum()))
        self.mask_weight()

    def release(self) -> None:
        """Forget everything but the masked weight."""
        self._original = None
        self.mask_weight()


def slices(tensor: Tensor, dim: int, keep: Tensor) -> Tensor:
    """A contiguous copy of the slices at `keep`, which may be on another device."""
    return tensor.index_select(dim, keep.to(tensor.device)).contiguous()


def check_mask_entry(name: str, shape: tuple[int, ...], entry: Mapping[str, Any]) -> None:
    """Refuse a checkpoint's mask that does not fit a weight of `shape`."""
    mask, wanted = entry.get("mask"), packed_shape(shape)
    if not isinstance(mask, Tensor) or mask.dtype != torch.uint8 or tuple(mask.shape) != wanted:
        raise ValueError(f"the mask of {name} is not {wanted} B")
