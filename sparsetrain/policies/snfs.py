"""SNFS: drop by magnitude, redistribute and grow by momentum (Dettmers & Zettlemoyer 2019)."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from sparsetrain._apportion import apportion
from sparsetrain.policies.base import DynamicPolicy
from sparsetrain.policies.engine import drop_smallest, grow_by_score, is_unstructured
from sparsetrain.policies.group import TargetGroup
from sparsetrain.schedules import Schedule, as_schedule
from sparsetrain.scores.base import gradient_of


def _cosine(value: Any) -> Schedule:
    return as_schedule(value, "cosine")


class SNFS(DynamicPolicy):
    """Sparse networks from scratch: sparse momentum (Dettmers & Zettlemoyer 2019, Algorithm 2).

    Each layer drops the same share of its smallest weights; the freed connections go to layers
    in proportion to the mean momentum magnitude of their weights, and grow where the momentum of
    inactive weights is largest. The momentum is this policy's own running mean of the dense
    gradient, 4 bytes a weight, because the base optimizer's holds only active weights.
    """

    kind: Literal["snfs"] = "snfs"
    dense_gradient: ClassVar[Literal["never", "updates", "always"]] = "always"

    drop_fraction: Annotated[Schedule, BeforeValidator(_cosine)] = Field(
        default_factory=lambda: _cosine(0.5),
        validate_default=True,
        description="share of active weights replaced at an update, in [0, 1]; a number decays "
        "to 0 as a cosine",
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="decay of the running mean gradient")

    @model_validator(mode="after")
    def _is_unstructured(self) -> SNFS:
        if not is_unstructured(self.structure):
            raise ValueError("SNFS moves single weights between layers: leave 'structure' out")
        return self

    def needs_dense_gradient(self, step: int) -> bool:
        """Until the last update; the momentum is not followed any longer."""
        return step < self.stop_step()

    def observe(self, group: TargetGroup, step: int) -> None:
        """Follow the dense gradient while updates are still to come."""
        if step >= self.stop_step():
            group.memory.clear()
            return
        for target in group.targets:
            if target.param.grad is None:
                continue
            gradient = target.param.grad.detach()
            mean = group.memory.get(target.name)
            if mean is None:
                group.memory[target.name] = gradient * (1 - self.momentum)
            else:
                mean.lerp_(gradient, 1 - self.momentum)

    def update_masks(self, group: TargetGroup, step: int) -> None:
        """Drop everywhere, then grow where momentum is large."""
        fraction = self.drop_fraction.at(self.progress(step))
        momenta = {t.name: self._momentum_of(t.name, t.param, group) for t in group.targets}
        dropped, kept = {}, {}
        for target in group.targets:
            active = target.active_indices()
            magnitude = target.active_values(active).abs_()
            count = int(fraction * target.active)
            dropped[target.name], kept[target.name] = drop_smallest(
                magnitude, active, count, target.name
            )
        growth = _redistribute(group, momenta, kept)
        for target in group.targets:
            name = target.name
            grown = grow_by_score(momenta[name], name)(kept[name], growth[name])
            group.exchange(target, dropped[name], grown)

    def _momentum_of(self, name: str, param: torch.nn.Parameter, group: TargetGroup) -> Tensor:
        if name not in group.memory:
            return gradient_of(name, param, self.kind).abs()
        momentum: Tensor = group.memory[name]
        return momentum.abs()


def _redistribute(
    group: TargetGroup, momenta: dict[str, Tensor], kept: dict[str, Tensor]
) -> dict[str, int]:
    """New connections for each layer, by the mean momentum magnitude of its kept weights."""
    total = sum(t.active - kept[t.name].numel() for t in group.targets)
    room = {t.name: t.numel - kept[t.name].numel() for t in group.targets}
    means = {name: _mean_at(momenta[name], kept[name], name) for name, free in room.items() if free}
    # A layer without any momentum still has a tiny claim, for when the others are full.
    smallest = max(means.values(), default=0.0) * 1e-9 or 1.0
    shares = [Fraction(max(mean, smallest)) for mean in means.values()]
    growth = apportion(shares, [room[name] for name in means], [1] * len(means), total)
    return dict.fromkeys(room, 0) | dict(zip(means, growth, strict=True))


def _mean_at(momentum: Tensor, kept: Tensor, name: str) -> float:
    mean = float(momentum.reshape(-1)[kept].double().mean()) if kept.numel() else 0.0
    if not mean < float("inf"):
        raise ValueError(f"the momentum of {name} is NaN or infinite: check its gradients")
    return mean
