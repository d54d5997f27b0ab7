"""A dense weight behind a parametrization that learns its mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from sparsetrain.learned import LearnedMask
from sparsetrain.storage.bits import pack_rows, unpack_rows
from sparsetrain.targets import SparseTarget

#: A module and the name that it has for the weight.
Place = tuple[nn.Module, str]


class LearnedTarget(SparseTarget):
    """A weight whose mask is a function of parameters that train with it.

    The weight is dense in memory and so is its training. `mask` is the one of evaluation.

    Attributes:
        learned: the parametrization.
        places: every module that has the weight (several when it is tied).
    """

    storage = "learned"

    def __init__(
        self, name: str, param: Parameter, places: list[Place], learned: LearnedMask
    ) -> None:
        super().__init__(name, param)
        self.places = places
        self.learned = learned
        self._hooks: list[RemovableHandle] = []
        self._told: Tensor | None = None
        self._final: Tensor | None = None

    @property
    def active(self) -> int:
        """Number of weights that evaluation keeps; counted at each call."""
        return int(self.mask.count_nonzero())

    @property
    def mask(self) -> Tensor:
        """Bool tensor of the weight's shape, True where evaluation keeps the weight."""
        return self._mask() if self._final is None else self._final

    @torch.no_grad()
    def _mask(self) -> Tensor:
        return self.learned.mask(self.param)

    @property
    def resting(self) -> int:
        """0: gates of dropped weights train on, and training computes with dense tensors."""
        return 0

    def attach(self) -> None:
        """Put the parametrization between the weight and its modules.

        Raises:
            ValueError: a module does not let it; all of them are then as they were.
        """
        try:
            for module, leaf in self.places:
                parametrize.register_parametrization(module, leaf, self.learned, unsafe=True)
                self._hooks += self.learned.hook(module)
        except Exception as error:
            self.detach()
            raise ValueError(f"{self.name} cannot be parametrized: {error}") from error

    def detach(self) -> None:
        """Take the parametrization out; the weight stays as the optimizer trains it."""
        for handle in self._hooks:
            handle.remove()
        self._hooks.clear()
        for module, leaf in self.places:
            if parametrize.is_parametrized(module, leaf):
                parametrize.remove_parametrizations(module, leaf, leave_parametrized=False)

    @torch.no_grad()
    def release(self) -> None:
        """Leave in the model what evaluation computes with."""
        self._final = self._mask()
        baked = self.learned.evaluated(self.param)
        self.detach()
        self.param.copy_(torch.where(self._final, baked, 0.0))

    @torch.no_grad()
    def settle(self) -> tuple[int, int, int]:
        """Count what evaluation keeps, and take up the best gate again when that is nothing.

        Returns:
            Weights that it dropped and took up since the last call, and those that are active.
        """
        now = self.mask
        active = int(now.count_nonzero())
        if not active:  # a layer without weights is lost
            self.learned.revive(self.param)
            now = self.mask
            active = int(now.count_nonzero())
        before = torch.ones_like(now) if self._told is None else self._told
        self._told = now
        dropped = int((before & ~now).count_nonzero())
        grown = int((now & ~before).count_nonzero())
        return dropped, grown, active

    def after_step(self, keeps_zeros: bool) -> None:
        """Bring the gates back into their range."""
        with torch.no_grad():
            self.learned.constrain()

    # Checkpoints. Gates and weight are parameters of the model, which saves them.

    def describe(self) -> dict[str, Any]:
        """The mask, for those who read the checkpoint."""
        return {"mask": pack_rows(self.mask)}

    def check_entry(self, entry: Mapping[str, Any]) -> None:
        """Nothing beside the mask."""

    def restore_entry(self, entry: Mapping[str, Any]) -> None:
        """The mask, where it is no function of gates and weight."""
        self._told = unpack_rows(entry["mask"], self.shape).to(self.param.device)
        self.learned.restore(self._told)
