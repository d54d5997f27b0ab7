"""What a policy works on: its targets, its memory, its random numbers, its report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsetrain.report.events import LayerChange
from sparsetrain.storage.masked import MaskedTarget


@dataclass
class TargetGroup:
    """The targets one policy holds, with everything of that policy that changes over time.

    Attributes:
        targets: in model order.
        generator: the optimizer's one random source (CPU).
        memory: tensors and numbers the policy keeps between steps; saved in checkpoints.
        changes: what the current update did, collected for the event.
    """

    targets: list[MaskedTarget]
    generator: torch.Generator
    state_of: Callable[[Tensor], Mapping[str, Any]]
    reset_state: Callable[[Tensor, Tensor, Tensor], None]
    memory: dict[str, Any] = field(default_factory=dict)
    changes: list[LayerChange] = field(default_factory=list)

    def exchange(
        self,
        target: MaskedTarget,
        dropped: Tensor,
        grown: Tensor,
        values: Tensor | None = None,
    ) -> None:
        """Drop and grow connections of a target; optimizer state of both starts afresh."""
        gone, new = target.exchange(dropped, grown, values)
        self.reset_state(target.param, gone, new)
        self.note(target, gone.numel(), new.numel())

    def replace_mask(self, target: MaskedTarget, mask: Tensor) -> None:
        """Install a whole mask (for latent weights, whose optimizer state stays dense)."""
        self.note(target, *target.replace_mask(mask))

    def note(self, target: MaskedTarget, dropped: int, grown: int) -> None:
        """Record what an update did to a target."""
        self.changes.append(LayerChange(target.name, dropped, grown, target.active, target.numel))
