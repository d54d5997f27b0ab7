"""Slimming: scale factors of batch normalisation are driven towards 0 while the network trains."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sparsetrain.allocation import ErdosRenyiKernel
from sparsetrain.candidates import Candidate
from sparsetrain.policies.base import Policy
from sparsetrain.policies.group import TargetGroup
from sparsetrain.structures import Unstructured


class Slimming(Policy):
    """An L1 penalty on the scale factors gamma of every batch normalisation, and no mask.

    Liu et al. 2017, "Learning efficient convolutional networks through network slimming", eq. 1.
    Its targets are the gammas, not weights. Channels with small ones are removed afterwards by
    `st.channels.prune(model, inputs, "slimming", ...)`.
    """

    of: ClassVar[str] = "batch norm scale"

    kind: Literal["slimming"] = "slimming"

    strength: float = Field(gt=0, description="of the penalty: times |gamma|, added to the loss")

    @model_validator(mode="after")
    def _prunes_nothing(self) -> Slimming:
        for field, default in (
            ("sparsity", None),
            ("allocation", ErdosRenyiKernel()),
            ("structure", Unstructured()),
        ):
            if getattr(self, field) != default:
                raise ValueError(
                    f"slimming prunes nothing while it trains: leave {field!r} out, and say how "
                    "much goes when channels are removed"
                )
        return self

    def _needs_sparsity(self) -> bool:
        return False

    def takes(self, candidate: Candidate) -> bool:
        """Scale factors of batch normalisations."""
        return candidate.is_batch_norm_scale

    def accepts(self, candidate: Candidate) -> bool:
        """Nothing else, even if a rule names it."""
        return candidate.is_batch_norm_scale

    def counts(self, group: TargetGroup) -> dict[str, int]:
        """All of them."""
        return {target.name: target.numel for target in group.targets}

    def initial_masks(self, group: TargetGroup) -> dict[str, Tensor]:
        """None: everything stays active."""
        return {}

    def observe(self, group: TargetGroup, step: int) -> None:
        """Add the penalty's subgradient, strength * sign(gamma)."""
        for target in group.targets:
            if target.param.grad is not None:
                signs = target.part.held(target.param).sign()
                target.part.held(target.param.grad).add_(signs, alpha=self.strength)

    def penalty(self, group: TargetGroup, step: int) -> Tensor:
        """strength * sum |gamma|"""
        sizes = [t.part.sum(t.part.held(t.param).abs().sum()) for t in group.targets]
        return self.strength * torch.stack(sizes).sum()
