"""What a policy works on: its targets, its memory, its random numbers, its plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from sparsetrain.report.events import LayerChange
from sparsetrain.targets import Exchanged, ExchangeTarget, SparseTarget

TargetT = TypeVar("TargetT", bound=SparseTarget)


@dataclass
class TargetGroup:
    """The targets one policy holds, with everything of that policy that changes over time.

    Attributes:
        targets: in model order.
        generator: the optimizer's one random source (CPU).
        state_of: the base optimizer's state of a parameter.
        carry_state: (target, change) -> what the change returns; makes an exchange and takes the
            optimizer's state along.
        memory: tensors and numbers the policy keeps between steps; saved in checkpoints.
    """

    targets: list[SparseTarget]
    generator: torch.Generator
    state_of: Callable[[Tensor], Mapping[str, Any]]
    carry_state: Callable[[ExchangeTarget, Callable[[], Exchanged]], Exchanged]
    memory: dict[str, Any] = field(default_factory=dict)
    _planned: list[Callable[[], LayerChange]] = field(default_factory=list)

    def held_as(self, kind: type[TargetT]) -> list[TargetT]:
        """All targets, which are known to be of this kind."""
        return [target for target in self.targets if isinstance(target, kind)]

    @property
    def exchangeable(self) -> list[ExchangeTarget]:
        """All targets, for a policy that says which connections go and which come."""
        return [target for target in self.targets if isinstance(target, ExchangeTarget)]

    @property
    def to_choose(self) -> list[ExchangeTarget]:
        """The targets whose first mask is the policy's choice; others came sparse."""
        return [target for target in self.exchangeable if not target.built]

    def with_gradients(self, kind: str) -> list[ExchangeTarget]:
        """The targets that got a gradient; a layer that the step did not use has none.

        Raises:
            ValueError: no target has one.
        """
        found = [target for target in self.exchangeable if target.has_gradient]
        if not found:
            raise ValueError(
                f"policy {kind!r} needs the gradient of {self.targets[0].name}: call backward() "
                "before the update"
            )
        return found

    def exchange(
        self,
        target: ExchangeTarget,
        dropped: Tensor,
        grown: Tensor,
        values: Tensor | None = None,
    ) -> None:
        """Plan to drop and grow connections of a target; optimizer state of both starts afresh."""

        def change() -> LayerChange:
            done = self.carry_state(target, lambda: target.exchange(dropped, grown, values))
            return _change_of(target, done.dropped, done.grown)

        self.plan(change)

    def replace_mask(self, target: ExchangeTarget, mask: Tensor) -> None:
        """Plan a whole new mask (for latent weights, whose optimizer state stays dense)."""
        self.plan(lambda: _change_of(target, *target.replace_mask(mask)))

    def plan(self, change: Callable[[], LayerChange]) -> None:
        """Plan any other change of one target."""
        self._planned.append(change)

    def commit(self) -> list[LayerChange]:
        """Make the planned changes; returns what they did to each layer."""
        changes = [change() for change in self._planned]
        self._planned.clear()
        return changes

    def discard(self) -> None:
        """Forget the planned changes."""
        self._planned.clear()


def _change_of(target: SparseTarget, dropped: int, grown: int) -> LayerChange:
    """What an update did to a target, which is as it left it."""
    return LayerChange(target.name, dropped, grown, target.active, target.numel)
