"""Masked-dense storage that also keeps the dense, latent weights behind the masked ones.

Surgery and SR-STE compute with masked weights but train all of them (straight-through). The
model's parameter holds the masked weight, so that everybody who looks at the model sees what
it computes with; the latent values of inactive weights wait here and are put back only while
the base optimizer steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from sparsetrain.storage.kernels import read_flat, write_flat_
from sparsetrain.storage.masked import MaskedTarget, slices


class LatentTarget(MaskedTarget):
    """A masked parameter plus the latent dense weight, 4 more bytes a float32 weight."""

    def __init__(self, name: str, param: Parameter) -> None:
        super().__init__(name, param)
        self._latent = self.weight().clone()
        self._revealed = False

    def latent_weight(self) -> Tensor:
        """Dense weight of what is held here; active entries are the model's own."""
        self.follow_device()
        if self._revealed:
            return self.weight()
        return torch.where(self._mask, self.weight(), self._latent)

    def replace_mask(self, mask: Tensor) -> tuple[int, int]:
        """Install a new mask; weights that come back resume from their latent value."""
        self._latent = self.latent_weight()
        self.weight().copy_(self._latent)
        return super().replace_mask(mask)

    def _write_exchanged(self, gone: Tensor, new: Tensor, values: Tensor | None) -> None:
        write_flat_(self._latent, gone, read_flat(self.weight(), gone))
        super()._write_exchanged(gone, new, read_flat(self._latent, new))

    def follow(self, param: Parameter) -> None:
        """Go on with a sharded parameter, the latent weight too."""
        super().follow(param)
        self._latent = self.part.held(self._latent).clone()

    def take(self, dim: int, keep: Tensor) -> None:
        """Follow the parameter, the latent weight too."""
        super().take(dim, keep)
        self._latent = slices(self._latent, dim, keep)

    def mask_gradient(self) -> None:
        """Leave the gradient dense: the straight-through estimate for inactive weights."""

    def follow_device(self) -> None:
        """Take mask and latent weight to the device that the weight is on."""
        super().follow_device()
        self._latent = self._latent.to(self._mask.device)

    def before_step(self) -> None:
        """Put the latent weights back for the base optimizer to step on."""
        self._original = None
        self.follow_device()
        if not self._revealed:
            self.weight().copy_(self.latent_weight())
            self._revealed = True

    def conceal(self) -> None:
        """Take the latent weights out again, so that the forward pass sees the masked ones."""
        if self._revealed:
            self._latent.copy_(self.weight())
            self._revealed = False
            self.mask_weight()

    def after_step(self, keeps_zeros: bool) -> None:
        """Conceal the stepped latent weights."""
        self.conceal()

    def extra_state(self) -> dict[str, Tensor]:
        """The latent weight."""
        return {"latent": self.part.wrap(self.latent_weight().clone())}

    def restore(self, mask: Tensor, state: dict[str, Any]) -> None:
        """Take mask and latent weights of a checkpoint; active weights stay those of the model."""
        self.follow_device()
        self._latent = self.part.held(state["latent"]).to(self._latent).clone()
        self._revealed = False
        super().restore(mask, state)

    def release(self) -> None:
        """Drop the latent weights for good."""
        super().release()
        self._latent = self._latent.new_empty(0)
