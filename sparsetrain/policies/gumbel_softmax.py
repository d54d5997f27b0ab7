"""Gumbel-softmax masks: keep or drop, or one of the N:M patterns (Jang et al. 2017)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sparsetrain.candidates import Candidate
from sparsetrain.learned import LearnedMask
from sparsetrain.learned.base import gate_dtype, gates_like
from sparsetrain.learned.gumbel_softmax import GumbelSoftmaxMask, PatternMask, patterns
from sparsetrain.learned.sharing import Per, Sharing, share
from sparsetrain.policies.group import TargetGroup
from sparsetrain.policies.learned import LearnedPolicy
from sparsetrain.schedules import LinearSchedule, Schedule
from sparsetrain.storage.learned import LearnedTarget
from sparsetrain.structures import NM, Block, Structure, Unstructured


class GumbelSoftmax(LearnedPolicy):
    """A choice between keep and drop, drawn with Gumbel noise (Jang et al. 2017, eq. 2).

    For a choice between two, the difference of two Gumbel variables is a logistic one, so a gate
    has one logit. Choices
    harden as `temperature` falls and `scale` rises. The regulariser is the
    expected number of kept weights.

    With `structure` n:m the choice is among the C(m, n) patterns of each group (MaskLLM, Fang et
    al. 2024). The sparsity is then 1 - n/m, and there is nothing to steer.
    """

    kind: Literal["gumbel_softmax"] = "gumbel_softmax"
    structures: ClassVar[tuple[type[Structure], ...]] = (Unstructured, NM, Block)

    per: Per = Field("weight", description="a choice for each weight, input unit or output unit")
    hard: bool = Field(
        True,
        description="train with masks of 0 and 1 and the gradient of soft ones (straight-through)",
    )
    keep_rate: float = Field(0.9, gt=0, lt=1, description="probability of keeping at the start")
    temperature: LinearSchedule = Field(
        default_factory=lambda: Schedule(shape="linear", initial=1.0, final=0.1),
        description="of the noise, from the first step to the last",
    )
    scale: LinearSchedule | None = Field(
        None,
        description="what logits are multiplied with before the noise, so that choices harden; "
        "null: 1 to 5, and for n:m 100 to 500 (MaskLLM)",
    )
    prior: float = Field(
        3.0,
        ge=0,
        description="n:m only: how much the start favours the pattern of largest magnitudes, in "
        "standard deviations of the noise",
    )

    @model_validator(mode="after")
    def _choice_is_clear(self) -> GumbelSoftmax:
        if min(self.temperature.initial, self.temperature.final) <= 0:
            raise ValueError("'temperature' has to stay above 0")
        if min(self._scale.initial, self._scale.final) <= 0:
            raise ValueError("'scale' has to stay above 0")
        if not isinstance(self.structure, Unstructured) and self.per != "weight":
            raise ValueError("give either 'structure' or 'per', not both")
        return self

    def _takes_strength(self) -> bool:
        return not isinstance(self.structure, NM)

    @property
    def is_steered(self) -> bool:
        """Whether a sparsity was asked for that does not follow from n:m."""
        return super().is_steered and not isinstance(self.structure, NM)

    def group_options(self, options: dict[str, object]) -> dict[str, object]:
        """n:m logits are small numbers behind a large scale."""
        own = super().group_options(options)
        if isinstance(self.structure, NM) and self.mask_lr is None:
            own["lr"] = self._default_lr(options) / self._scale.initial
        return own

    @property
    def _scale(self) -> Schedule:
        if self.scale is not None:
            return self.scale
        first, last = (100.0, 500.0) if isinstance(self.structure, NM) else (1.0, 5.0)
        return Schedule(shape="linear", initial=first, final=last)

    def target_densities(self, group: TargetGroup) -> dict[str, float]:
        """n/m, or what the allocation sets."""
        if isinstance(self.structure, NM):
            return {t.name: self.structure.n / self.structure.m for t in group.targets}
        return super().target_densities(group)

    def learned_mask(self, candidate: Candidate, generator: torch.Generator) -> LearnedMask:
        """Logits of `keep_rate`, or of the patterns with a prior for large weights."""
        if self.per == "input":
            candidate.require_one_group(self.kind)
        weight = candidate.param.detach()
        shape = tuple(weight.shape)
        self.structure.check(shape, candidate.name)
        if isinstance(self.structure, NM):
            exact = weight.to(gate_dtype(weight))
            logits = self._pattern_logits(self.structure, exact, generator)
            sharing = Sharing(shape, shape, shape)
            return PatternMask(self.structure, sharing, logits, hard=self.hard)
        per = self.structure if isinstance(self.structure, Block) else self.per
        sharing = share(per, shape, transposed=candidate.is_transposed)
        rate = torch.tensor(self.keep_rate, dtype=torch.float64)
        logit = torch.full(sharing.gates, float(torch.logit(rate)))
        return GumbelSoftmaxMask(sharing, gates_like(weight, logit), hard=self.hard)

    def _pattern_logits(self, structure: NM, weight: Tensor, generator: torch.Generator) -> Tensor:
        groups = structure.units(weight.abs())
        kept = groups @ patterns(structure).to(groups).T
        size = groups.sum(-1, keepdim=True).clamp_min(torch.finfo(groups.dtype).tiny)
        noise = torch.randn(kept.shape, generator=generator).to(kept) * 0.01
        return (kept / size * self.prior + noise) / self._scale.initial

    def follow_clock(self, group: TargetGroup, step: int) -> None:
        """The temperature, and the scale of n:m logits."""
        progress = step / self.total_steps if self.total_steps else 0.0
        for target in group.held_as(LearnedTarget):
            learned = target.learned
            if isinstance(learned, GumbelSoftmaxMask | PatternMask):
                learned.temperature.fill_(self.temperature.at(progress))
                learned.scale.fill_(self._scale.at(progress))
