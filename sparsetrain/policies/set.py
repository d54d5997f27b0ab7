"""SET: drop by magnitude, grow at random (Mocanu et al. 2018)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sparsetrain._lookup import without
from sparsetrain.policies.base import DynamicPolicy
from sparsetrain.policies.engine import (
    drop_and_grow_units,
    is_unstructured,
    random_free,
)
from sparsetrain.policies.group import TargetGroup
from sparsetrain.schedules import ConstantFraction, as_schedule
from sparsetrain.selection import bottom_k_indices
from sparsetrain.targets import ExchangeTarget


class SET(DynamicPolicy):
    """Sparse evolutionary training: every so often the smallest weights move to random places.

    Mocanu et al. 2018, "Scalable training of artificial neural networks with adaptive sparse
    connectivity inspired by network science", Algorithm 1. The gradient step comes first, then
    the change of masks.
    """

    kind: Literal["set"] = "set"
    default_stop: ClassVar[float] = 1.0

    drop_fraction: ConstantFraction = Field(
        default_factory=lambda: as_schedule(0.3, "constant"),
        description="share of active weights replaced at an update, in [0, 1] (zeta); a number "
        "is constant over training",
    )
    drop: Literal["magnitude", "magnitude_by_sign"] = Field(
        "magnitude",
        description="drop the smallest |w|; or, as in the paper, the same share of the smallest "
        "positive and of the largest negative weights",
    )
    grow_std: float = Field(
        0.0, ge=0, description="standard deviation of new weights; 0 starts them at exactly 0"
    )

    @model_validator(mode="after")
    def _structure_drops_by_magnitude(self) -> SET:
        if not is_unstructured(self.structure) and (self.drop != "magnitude" or self.grow_std):
            raise ValueError(
                "'drop' by sign and 'grow_std' are for single weights: leave 'structure' out"
            )
        return self

    def update_masks(self, group: TargetGroup, step: int) -> None:
        """Drop by magnitude, grow at random."""
        fraction = self.drop_fraction.at(self.progress(step))
        for target in group.exchangeable:
            if not is_unstructured(self.structure):
                magnitude = target.param.detach().abs()
                wish = torch.rand(target.shape, generator=group.generator).to(magnitude.device)
                drop_and_grow_units(group, target, fraction, magnitude, wish, self.structure)
                continue
            active = target.active_indices()
            if self.drop == "magnitude":
                dropped = target.least_active(int(fraction * target.active))
            else:
                values = target.active_values(active)
                dropped = active[smallest_of_each_sign(values, fraction, target.name)]
            kept = without(active, dropped)
            grown = random_free(target.numel, kept, dropped.numel(), group.generator)
            group.exchange(target, dropped, grown, self._start_values(group, target, grown.numel()))

    def _start_values(
        self, group: TargetGroup, target: ExchangeTarget, count: int
    ) -> Tensor | None:
        """New weights drawn from a normal, or None for zeros."""
        if self.grow_std == 0:
            return None
        drawn = torch.randn(count, generator=group.generator) * self.grow_std
        return drawn.to(target.param.detach())


def smallest_of_each_sign(values: Tensor, fraction: float, name: str) -> Tensor:
    """Positions of the given share of the smallest positives, and of the largest negatives."""
    chosen = []
    for side in (values >= 0, values < 0):
        positions = side.nonzero().view(-1)
        count = int(fraction * positions.numel())
        chosen.append(positions[bottom_k_indices(values[positions].abs(), count, name=name)])
    return torch.cat(chosen).sort().values
