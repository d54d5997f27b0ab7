"""Gradual pruning: sparsity rises along a curve, the least important weights go first."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sparsetrain.allocation import Global, allocate
from sparsetrain.policies.base import DynamicPolicy, best_masks
from sparsetrain.policies.engine import flat_indices, is_unstructured
from sparsetrain.policies.group import TargetGroup
from sparsetrain.schedules import Schedule, UpdateSchedule
from sparsetrain.scores import Magnitude, ScoreField
from sparsetrain.scores.base import ACCUMULATED
from sparsetrain.selection import select, top_k_across
from sparsetrain.targets import ExchangeTarget

_EMPTY = torch.empty(0, dtype=torch.int64)


class Gradual(DynamicPolicy):
    """Gradual magnitude pruning, and the same with any other score (Zhu & Gupta 2017, eq. 1).

    s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3. Pruned weights stay pruned; the last
    update of the schedule reaches `sparsity` exactly.
    """

    kind: Literal["gradual"] = "gradual"
    starts_dense: ClassVar[bool] = True

    initial_sparsity: float = Field(0.0, ge=0, lt=1, description="share of zeros at the start")
    shape: Literal["cubic", "linear", "cosine"] = Field(
        "cubic", description="curve from initial_sparsity to sparsity"
    )
    score: ScoreField = Field(default_factory=Magnitude, description="what decides who stays")
    update: UpdateSchedule = Field(
        default_factory=UpdateSchedule, description="when masks change (steps)"
    )

    @model_validator(mode="after")
    def _sparsity_rises(self) -> Gradual:
        if self.allocation.fixes_density:
            raise ValueError(
                f"Gradual needs a 'sparsity' to rise to; allocation {self.allocation.kind!r} "
                "fixes the densities"
            )
        if self.sparsity is not None and self.initial_sparsity > self.sparsity:
            raise ValueError(
                f"initial_sparsity={self.initial_sparsity} is above sparsity={self.sparsity}"
            )
        if self.structure.kind == "n_m":
            raise ValueError("n:m has one sparsity only and cannot rise: use NMSparse or Static")
        return self

    def initial_masks(self, group: TargetGroup) -> dict[str, Tensor]:
        """The weights of largest magnitude at `initial_sparsity` (all of them when it is 0)."""
        self.counts(group)  # the end has to be reachable; better told now than then
        counts = self._counts_at(group, self.initial_sparsity)
        magnitudes = {t.name: t.part.held(t.param).abs() for t in group.to_choose}
        return best_masks(self, group, magnitudes, counts)

    def last_update(self) -> int:
        """The step of the last update, where the curve ends."""
        stop, update = self.stop_step(), self.update
        return update.start + (max(stop - 1 - update.start, 0) // update.every) * update.every

    def sparsity_at(self, step: int) -> float:
        """Share of zeros that the curve asks for at `step`."""
        assert self.sparsity is not None  # checked by the validator
        start, last = self.update.start, self.last_update()
        curve = Schedule(shape=self.shape, initial=self.initial_sparsity, final=self.sparsity)
        return curve.at((step - start) / (last - start) if last > start else 1.0)

    def update_masks(self, group: TargetGroup, step: int) -> None:
        """Drop the least important active weights down to the curve's counts."""
        current = {t.name: t.active for t in group.exchangeable}
        counts = self._counts_at(group, self.sparsity_at(step), current)
        scores = {
            t.name: self.score.of(t.name, t.param, self._known(group, t), group.generator)
            for t in group.exchangeable
        }
        if isinstance(self.allocation, Global):
            self._drop_across(group, scores, sum(counts.values()))
            return
        for target in group.exchangeable:
            self._drop_to(group, target, scores[target.name], counts[target.name])

    def observe(self, group: TargetGroup, step: int) -> None:
        """Let a score that is a sum over steps see this one."""
        if not self.score.accumulates or step > self.last_update():
            return
        for target in group.exchangeable:
            key = _seen(target)
            seen = self.score.observe(target.name, target.param, group.memory.get(key))
            if seen is not None:
                group.memory[key] = seen

    def remembers(self, group: TargetGroup) -> dict[str, Tensor]:
        """What the score has summed of every weight."""
        if not self.score.accumulates:
            return {}
        return {_seen(t): torch.zeros_like(t.param.detach()) for t in group.exchangeable}

    def _known(self, group: TargetGroup, target: ExchangeTarget) -> dict[str, Any]:
        """What a score may look at beside the weight."""
        known = dict(group.state_of(target.param))
        if _seen(target) in group.memory:
            known[ACCUMULATED] = group.memory[_seen(target)]
        return known

    def _counts_at(
        self, group: TargetGroup, sparsity: float, limits: dict[str, int] | None = None
    ) -> dict[str, int]:
        return allocate(self.allocation, self.layer_shapes(group), sparsity, limits)

    def _drop_to(
        self, group: TargetGroup, target: ExchangeTarget, scores: Tensor, count: int
    ) -> None:
        if is_unstructured(self.structure):
            values = target.at_active(scores)
            gone = target.least(target.active_indices(), values, target.active - count)
        else:
            here, part = target.part.held(scores), target.part
            last = part.lowest(float(here.min()) if here.numel() else math.inf) - 1
            ranked = torch.where(target.held_mask, here, last)
            keep = select(ranked, count, self.structure, name=target.name, part=part)
            gone = flat_indices(target.held_mask & ~keep)
        group.exchange(target, gone, _EMPTY.to(gone.device))

    def _drop_across(self, group: TargetGroup, scores: dict[str, Tensor], total: int) -> None:
        """One ranking over all active weights of the group."""
        active = {t.name: t.active_indices() for t in group.exchangeable}
        values = {t.name: t.at_active(scores[t.name]) for t in group.exchangeable}
        parts = {t.name: t.part for t in group.exchangeable}
        total = min(total, sum(t.active for t in group.exchangeable))
        keep = top_k_across(values, total, parts=parts)
        for target in group.exchangeable:
            gone = active[target.name][~keep[target.name]]
            group.exchange(target, gone, _EMPTY.to(gone.device))


def _seen(target: ExchangeTarget) -> str:
    return f"{target.name}.seen"
