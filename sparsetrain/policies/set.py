"""SET: drop by magnitude, grow at random (Mocanu et al. 2018)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sparsetrain.policies.base import DynamicPolicy
from sparsetrain.policies.engine import drop_and_grow_units, is_unstructured
from sparsetrain.policies.group import TargetGroup
from sparsetrain.schedules import ConstantFraction, as_schedule
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
                magnitude = target.part.held(target.param).abs()
                wish = target.part.held(torch.rand(target.shape, generator=group.generator))
                wish = wish.to(magnitude.device)
                drop_and_grow_units(group, target, fraction, magnitude, wish, self.structure)
                continue
            if self.drop == "magnitude":
                count = int(fraction * target.active)
                dropped = target.least_active(count)
            else:
                dropped, count = smallest_of_each_sign(target, fraction)
            grown = target.random_free(count, dropped, group.generator)
            values = self._start_values(group, target, grown, count)
            group.exchange(target, dropped, grown, values)

    def _start_values(
        self, group: TargetGroup, target: ExchangeTarget, grown: Tensor, count: int
    ) -> Tensor | None:
        """New weights drawn from a normal, or None for zeros."""
        if self.grow_std == 0:
            return None
        drawn = torch.randn(count, generator=group.generator) * self.grow_std
        return target.drawn_for(grown, drawn)


def smallest_of_each_sign(target: ExchangeTarget, fraction: float) -> tuple[Tensor, int]:
    """Flat indices, ascending, of the given share of the smallest positive active weights and of
    the largest negative ones, and how many these are in the whole weight."""
    active = target.active_indices()
    values = target.active_values(active)
    chosen, total = [], 0
    for side in (values >= 0, values < 0):
        count = int(fraction * target.total(int(side.count_nonzero())))
        chosen.append(target.least(active[side], values[side].abs(), count))
        total += count
    return torch.cat(chosen).sort().values, total
