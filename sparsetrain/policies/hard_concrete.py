"""L0 regularisation with hard-concrete gates (Louizos et al. 2018)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, model_validator

from sparsetrain.candidates import Candidate
from sparsetrain.learned.base import gates_like
from sparsetrain.learned.hard_concrete import HardConcreteMask
from sparsetrain.learned.sharing import Per, share
from sparsetrain.policies.learned import LearnedPolicy


class HardConcrete(LearnedPolicy):
    """weight * z, z from a hard-concrete distribution (Louizos et al. 2018, eq. 10 to 13).

    The regulariser is the expected number of weights that are not 0, eq. 11. Its `strength` is
    lambda a weight when the loss is a mean over examples: the paper's lambda / N.
    """

    kind: Literal["hard_concrete"] = "hard_concrete"

    per: Per = Field("weight", description="a gate for each weight, input unit or output unit")
    drop_rate: float = Field(
        0.1, gt=0, lt=1, description="probability of a closed gate at the start; paper 0.2 to 0.5"
    )
    spread: float = Field(
        0.01, ge=0, description="standard deviation of log_alpha at the start, as in the paper"
    )
    sampling: Literal["batch", "example"] = Field(
        "batch", description="one draw of the gates a pass, or one for each example"
    )
    l2: float = Field(
        0.0, ge=0, description="weight of half the expected squared norm, against the count's"
    )

    @model_validator(mode="after")
    def _examples_need_units(self) -> HardConcrete:
        if self.sampling == "example" and self.per == "weight":
            raise ValueError(
                "sampling 'example' needs gates of whole units: per='input' or per='output'"
            )
        return self

    def learned_mask(self, candidate: Candidate, generator: torch.Generator) -> HardConcreteMask:
        """Gates with log_alpha near log((1 - drop_rate) / drop_rate)."""
        if self.per == "input":
            candidate.require_one_group(self.kind)
        if self.sampling == "example":
            candidate.require_forward(f"{self.kind} with sampling='example'")
        weight = candidate.param.detach()
        sharing = share(self.per, tuple(weight.shape), transposed=candidate.is_transposed)
        start = torch.randn(sharing.gates, generator=generator) * self.spread
        start += math.log((1 - self.drop_rate) / self.drop_rate)
        side = None if self.per == "weight" else self.per
        return HardConcreteMask(
            sharing, gates_like(weight, start), sampling=self.sampling, side=side, l2=self.l2
        )
