"""Dynamic network surgery: prune, and splice back what turns out to matter (Guo et al. 2016)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sparsetrain.allocation import Global
from sparsetrain.policies.base import DynamicPolicy
from sparsetrain.policies.engine import is_unstructured
from sparsetrain.policies.group import TargetGroup
from sparsetrain.schedules import EveryStepSchedule, UpdateSchedule
from sparsetrain.selection import top_k
from sparsetrain.storage.latent import LatentTarget
from sparsetrain.targets import SparseTarget


class DynamicNetworkSurgery(DynamicPolicy):
    """Two thresholds around t, with hysteresis, on dense latent weights (Guo et al. 2016, eq. 4).

    A weight is pruned when |w| <= (1 - margin) t, spliced back when |w| > (1 + margin) t, and left
    as it is in between. Gradients reach pruned weights as if they were active (straight-through).
    Each layer is updated with probability (1 + gamma i)^-power, i counting from `update.start`.

    The threshold is either the paper's, t = max(mean|w| + c_rate std|w|, 0) taken once at the
    start, or, with `sparsity`, the quantile that leaves exactly the allocated count: active
    weights are ranked by |w| / (1 - margin) and inactive ones by |w| / (1 + margin), which is
    the same rule with t chosen by count.
    """

    kind: Literal["dynamic_network_surgery"] = "dynamic_network_surgery"
    latent: ClassVar[bool] = True
    starts_dense: ClassVar[bool] = True
    dense_gradient: ClassVar[Literal["never", "updates", "always"]] = "always"

    c_rate: float | None = Field(
        None, description="standard deviations of |w| above its mean; instead of 'sparsity'"
    )
    margin: float = Field(0.1, ge=0, lt=1, description="half width of the hysteresis around t")
    gamma: float = Field(1e-4, ge=0, description="decay of the update probability per step")
    power: float = Field(1.0, ge=0, description="exponent of that decay")
    update: EveryStepSchedule = Field(
        default_factory=lambda: UpdateSchedule(every=1),
        description="when masks may change (steps); training before `start` is dense",
    )

    @model_validator(mode="after")
    def _one_threshold(self) -> DynamicNetworkSurgery:
        if self.c_rate is not None and (self.sparsity is not None or self.allocation.fixes_density):
            raise ValueError("give either 'sparsity' (or densities) or 'c_rate', not both")
        if isinstance(self.allocation, Global):
            raise ValueError("surgery decides layer by layer: choose another 'allocation'")
        if not is_unstructured(self.structure):
            raise ValueError("surgery decides weight by weight: leave 'structure' out")
        return self

    def _needs_sparsity(self) -> bool:
        return self.c_rate is None and super()._needs_sparsity()

    def target_densities(self, group: TargetGroup) -> dict[str, float]:
        """The allocated densities; nothing when `c_rate` lets thresholds decide."""
        return {} if self.c_rate is not None else super().target_densities(group)

    def initial_masks(self, group: TargetGroup) -> dict[str, Tensor]:
        """Dense: surgery begins with its first update."""
        if self.c_rate is None:
            self.counts(group)  # the sparsity has to be reachable; better told now than then
        return {t.name: torch.ones_like(t.held_mask) for t in group.targets}

    def update_masks(self, group: TargetGroup, step: int) -> None:
        """Prune and splice, layer by layer, each with the decaying probability."""
        probability = (1 + self.gamma * max(step - self.update.start, 0)) ** -self.power
        counts = None if self.c_rate is not None else self.counts(group)
        for target in group.held_as(LatentTarget):
            chance = float(torch.rand((), generator=group.generator))
            started = f"{target.name}.started" in group.memory
            if started and chance >= probability:
                continue
            group.memory[f"{target.name}.started"] = True
            magnitude = target.latent_weight().abs()
            if counts is None:
                mask = self._by_threshold(group, target, magnitude)
            else:
                mask = self._by_count(target, magnitude, counts[target.name])
            group.replace_mask(target, mask)

    def after_narrowing(self, group: TargetGroup, narrowed: Sequence[SparseTarget]) -> None:
        """As the base; with `c_rate`, which allocates no counts, any shape will do."""
        if self.c_rate is None:
            super().after_narrowing(group, narrowed)

    def _by_count(self, target: LatentTarget, magnitude: Tensor, count: int) -> Tensor:
        near = 1 - self.margin
        handicap = near / (1 + self.margin)
        ranked = torch.where(target.held_mask, magnitude, magnitude * handicap)
        return top_k(ranked, count, name=target.name, part=target.part)

    def _by_threshold(self, group: TargetGroup, target: LatentTarget, magnitude: Tensor) -> Tensor:
        key = f"{target.name}.threshold"
        if key not in group.memory:
            mean, std = mean_and_std(target, magnitude)
            group.memory[key] = max(mean + (self.c_rate or 0.0) * std, 0.0)
        threshold = group.memory[key]
        if target.total(int(torch.count_nonzero(~torch.isfinite(magnitude)))):
            raise ValueError(f"weights of {target.name} are NaN or infinite")
        stay = magnitude > (1 - self.margin) * threshold
        splice = magnitude > (1 + self.margin) * threshold
        return torch.where(target.held_mask, stay, splice)


def mean_and_std(target: LatentTarget, values: Tensor) -> tuple[float, float]:
    """Of a number for each weight, of which these are held here; the population's deviation."""
    if target.part.is_whole:
        std, mean = torch.std_mean(values.double(), correction=0)
        return float(mean), float(std)
    mean = target.part.sum(values.double().sum().cpu()) / target.numel
    squares = target.part.sum((values.double() - mean.to(values.device)).square().sum().cpu())
    return float(mean), math.sqrt(float(squares) / target.numel)
