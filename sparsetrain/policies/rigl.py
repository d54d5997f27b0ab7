"""RigL: drop by magnitude, grow by gradient (Evci et al. 2020)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from sparsetrain.policies.base import DynamicPolicy
from sparsetrain.policies.engine import drop_and_grow_units, is_unstructured
from sparsetrain.policies.group import TargetGroup
from sparsetrain.schedules import CosineFraction, as_schedule
from sparsetrain.scores.base import gradient_of


class RigL(DynamicPolicy):
    """The rigged lottery, Algorithm 1 of Evci et al. 2020.

    Every `update.every` steps, in place of the gradient step: each layer drops the share
    f(t) = alpha/2 (1 + cos(pi t / T_end)) of its active weights with the smallest magnitude and
    grows as many where the dense gradient is largest, at value 0.
    """

    kind: Literal["rigl"] = "rigl"
    replaces_step: ClassVar[bool] = True
    dense_gradient: ClassVar[Literal["never", "updates", "always"]] = "updates"

    drop_fraction: CosineFraction = Field(
        default_factory=lambda: as_schedule(0.3, "cosine"),
        description="share of active weights replaced at an update, in [0, 1]; a number is "
        "alpha, decaying to 0 as a cosine",
    )

    def update_masks(self, group: TargetGroup, step: int) -> None:
        """Drop by magnitude, grow by gradient."""
        fraction = self.drop_fraction.at(self.progress(step))
        for target in group.with_gradients(self.kind):
            if is_unstructured(self.structure):
                count = int(fraction * target.active)
                dropped = target.least_active(count)
                group.exchange(target, dropped, target.steepest_free(count, dropped))
            else:
                magnitude, wish = (
                    target.part.held(tensor).abs()
                    for tensor in (target.param, gradient_of(target.name, target.param, self.kind))
                )
                drop_and_grow_units(group, target, fraction, magnitude, wish, self.structure)
