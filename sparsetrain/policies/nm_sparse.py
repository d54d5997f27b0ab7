"""N:M sparsity from scratch with SR-STE (Zhou et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sparsetrain.allocation import ErdosRenyiKernel
from sparsetrain.policies.base import Policy
from sparsetrain.policies.group import TargetGroup
from sparsetrain.schedules import EveryStepSchedule, UpdateSchedule
from sparsetrain.selection import n_m_mask
from sparsetrain.storage.latent import LatentTarget
from sparsetrain.structures import NM
from sparsetrain.targets import SparseTarget


class NMSparse(Policy):
    """At most n non-zeros in every group of m inputs, chosen anew from dense latent weights.

    Zhou et al. 2021, "Learning N:M fine-grained structured sparse neural networks from scratch":
    straight-through gradients, plus decay of the pruned latent weights (SR-STE, eq. 10),
    g + decay (1 - mask) w. Groups run along the inputs (input channels of a convolution).
    """

    kind: Literal["nm_sparse"] = "nm_sparse"
    latent: ClassVar[bool] = True
    dense_gradient: ClassVar[Literal["never", "updates", "always"]] = "always"

    n: int = Field(2, ge=1, description="non-zeros kept in a group")
    m: int = Field(4, ge=2, description="weights in a group")
    decay: float = Field(2e-4, ge=0, description="pull of pruned latent weights towards 0")
    update: EveryStepSchedule = Field(
        default_factory=lambda: UpdateSchedule(every=1), description="when masks change (steps)"
    )
    total_steps: int | None = Field(None, ge=1, description="optimizer steps in the whole run")

    @model_validator(mode="before")
    @classmethod
    def _sparsity_sets_n(cls, data: Any) -> Any:
        """Accept `sparsity` in place of n, and make both agree."""
        if not isinstance(data, dict):
            return data
        m = data.get("m", 4)
        sparsity = data.get("sparsity")
        if sparsity is None or not isinstance(m, int):
            return data
        sparsity = float(sparsity)
        n = round((1 - sparsity) * m)
        if not 0 < n <= m or abs(n / m - (1 - sparsity)) > 1e-9:
            choices = ", ".join(f"{1 - k / m:.4g}" for k in range(m, 0, -1))
            raise ValueError(f"sparsity={sparsity} is not n of m={m}; choose among {choices}")
        if data.get("n", n) != n:
            raise ValueError(f"sparsity={sparsity} and n:m={data['n']}:{m} disagree; give one")
        return {**data, "n": n}

    @model_validator(mode="after")
    def _structure_is_n_m(self) -> NMSparse:
        if self.n > self.m:
            raise ValueError(f"n={self.n} is larger than m={self.m}")
        self.update.stop_step(self.total_steps, 1.0)
        if self.allocation != ErdosRenyiKernel():
            raise ValueError("n:m fixes the density of every layer: leave 'allocation' out")
        if self.structure.kind != "unstructured":
            raise ValueError("NMSparse is its own structure: leave 'structure' out")
        return self

    def _needs_sparsity(self) -> bool:
        return False

    def with_sparsity(self, sparsity: float) -> NMSparse:
        """The same m at another n."""
        data = self.model_dump(exclude={"n"})
        return type(self).model_validate({**data, "sparsity": sparsity})

    def target_densities(self, group: TargetGroup) -> dict[str, float]:
        """n/m for every target."""
        return {t.name: self.n / self.m for t in group.targets}

    def initial_masks(self, group: TargetGroup) -> dict[str, Tensor]:
        """The n largest weights of every group."""
        structure = NM(n=self.n, m=self.m)
        for target in group.targets:
            structure.check(target.shape, target.name)
        return {t.name: self._mask(t, t.part.held(t.param)) for t in group.targets}

    def _mask(self, target: SparseTarget, weight: Tensor) -> Tensor:
        return n_m_mask(weight.abs(), self.n, self.m, name=target.name, part=target.part)

    def update_is_due(self, step: int) -> bool:
        """Every step, unless the update schedule says otherwise."""
        return self.update.is_due(step, self.total_steps, 1.0)

    def observe(self, group: TargetGroup, step: int) -> None:
        """Pull pruned latent weights towards 0 (SR-STE)."""
        for target in group.held_as(LatentTarget):
            grad = target.param.grad
            if grad is not None and self.decay:
                latent = target.latent_weight()
                pruned = torch.where(target.held_mask, 0.0, latent)
                target.part.held(grad).add_(pruned, alpha=self.decay)

    def update_masks(self, group: TargetGroup, step: int) -> None:
        """Choose the n largest latent weights of every group."""
        for target in group.held_as(LatentTarget):
            group.replace_mask(target, self._mask(target, target.latent_weight()))

    def after_narrowing(self, group: TargetGroup, narrowed: Sequence[SparseTarget]) -> None:
        """Choose anew at once: other inputs are in a group now, and n of each have to be left."""
        for target in narrowed:
            if isinstance(target, LatentTarget):
                target.replace_mask(self._mask(target, target.latent_weight()))
