"""Movement pruning (Sanh et al. 2020)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sparsetrain.allocation import AllocationField, Global, Uniform
from sparsetrain.candidates import Candidate
from sparsetrain.learned.base import gates_like
from sparsetrain.learned.movement import ScoresAboveMask, TopScoresMask
from sparsetrain.learned.sharing import share
from sparsetrain.policies.control import Budget, Steering
from sparsetrain.policies.group import TargetGroup
from sparsetrain.policies.learned import LearnedPolicy
from sparsetrain.schedules import UpdateSchedule
from sparsetrain.selection import top_k, top_k_across
from sparsetrain.storage.bits import pack_rows, unpack_rows
from sparsetrain.storage.learned import LearnedTarget
from sparsetrain.structures import Block, Structure, Unstructured

#: Of scores whose order alone counts, as in the authors' code.
_RANKED_LR = 1e-2


class Movement(LearnedPolicy):
    """Scores S that collect -w dL/dw through a straight-through mask (Sanh et al. 2020, eq. 4).

    "top_k" keeps the highest scores of each matrix (or of all, with allocation 'global'), ever
    fewer along a cubic schedule. "threshold" adds the regulariser, the sum of sigmoid(S), and keeps
    sigmoid(S) > threshold. With `strength`, the regulariser's weight, the threshold is fixed; with
    `sparsity` it is put where the wanted number of scores is above it.
    """

    kind: Literal["movement"] = "movement"
    #: With a sparsity the regulariser pulls at the scores as hard as the loss does, as long as it
    #: pulls at all: a score of 0 feels 0.25 times its weight, one of 10 nothing.
    steering: ClassVar[Steering] = Steering(start=1.0, least_pull=0.0025)
    structures: ClassVar[tuple[type[Structure], ...]] = (Unstructured, Block)

    mode: Literal["top_k", "threshold"] = Field("top_k", description="hard or soft movement")
    allocation: AllocationField = Field(
        default_factory=Uniform,
        description="'uniform' ranks within each matrix, as in the paper, 'global' across all",
    )
    threshold: float = Field(
        0.1,
        gt=0,
        lt=0.5,
        description="of sigmoid(S), reached along the schedule from 0; for a given 'strength'",
    )
    update: UpdateSchedule = Field(
        default_factory=lambda: UpdateSchedule(every=10),
        description="when masks are chosen (steps); the sparsity rises from `start` to `stop`",
    )

    @model_validator(mode="after")
    def _mode_fits(self) -> Movement:
        if self.mode == "top_k" and not self.is_steered:
            raise ValueError("mode 'top_k' needs a 'sparsity' to rise to")
        return self

    def learned_mask(
        self, candidate: Candidate, generator: torch.Generator
    ) -> TopScoresMask | ScoresAboveMask:
        """Scores of 0."""
        weight = candidate.param.detach()
        shape = tuple(weight.shape)
        self.structure.check(shape, candidate.name)
        sharing = share(self.structure if isinstance(self.structure, Block) else "weight", shape)
        scores = gates_like(weight, torch.zeros(sharing.gates))
        soft = self.mode == "threshold"
        if soft and not self.is_steered:
            return ScoresAboveMask(sharing, scores)
        return TopScoresMask(sharing, scores, has_penalty=soft)

    def _default_lr(self, options: dict[str, Any]) -> float:
        is_ranked = self.mode == "top_k" or self.is_steered
        return _RANKED_LR if is_ranked else super()._default_lr(options)

    def follow_clock(self, group: TargetGroup, step: int) -> None:
        """The threshold rises with the schedule."""
        for target in group.held_as(LearnedTarget):
            if isinstance(target.learned, ScoresAboveMask):
                risen = self.reached(step) if self.total_steps else 1.0
                target.learned.set_threshold(self.threshold * risen)

    def observe(self, group: TargetGroup, step: int) -> None:
        """Measure anew at each update how hard the loss pulls at the scores."""
        if self.update_is_due(step):
            for budget in self.budgets(group):
                group.memory.pop(f"{budget.key}.strength", None)
        super().observe(group, step)

    def _steer(
        self, group: TargetGroup, budget: Budget, step: int
    ) -> dict[str, Callable[[], None]]:
        """Keep the highest scores, as many as are wanted."""
        size = budget.targets[0].learned.sharing.size
        keep = round(self.wanted(budget, step) / size)
        gates = {t.name: t.gates()[0] for t in budget.targets}
        scores = {name: part.held(gate) for name, (gate, part) in gates.items()}
        parts = {name: part for name, (_, part) in gates.items()}
        if isinstance(self.allocation, Global):
            chosen = top_k_across(scores, keep, parts=parts)
        else:
            chosen = {
                name: top_k(values, keep, name=name, part=parts[name])
                for name, values in scores.items()
            }
        return {t.name: partial(_choose, t, chosen[t.name]) for t in budget.targets}


def _choose(target: LearnedTarget, chosen: Tensor) -> None:
    """Keep these of the scores that are here. The forward pass needs the choices of all ranks, a
    bit a score."""
    assert isinstance(target.learned, TopScoresMask)
    (_, part), whole = target.gates()[0], target.learned.chosen
    if not part.is_whole:
        packed = part.wrap(pack_rows(chosen)).full_tensor()  # type: ignore[attr-defined]
        chosen = unpack_rows(packed, tuple(whole.shape)).to(whole.device)
    whole.copy_(chosen)
