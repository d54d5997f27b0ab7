"""Masks by scores that learn from movement (Sanh et al. 2020)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter

from sparsetrain.learned.base import LearnedMask, MaskFunction, accumulate, put, where_positive
from sparsetrain.learned.sharing import Sharing


class _Scored(LearnedMask):
    """weight * mask(scores); the scores get the gradient of the mask (straight-through).

    Args:
        sharing: which weights share a score.
        scores: their start, of the gates' shape.
    """

    def __init__(self, sharing: Sharing, scores: Tensor) -> None:
        super().__init__(sharing)
        self.scores = Parameter(scores)

    def kept(self) -> Tensor:
        """1 where a score keeps its weights, else 0; of the gates' shape and type."""
        raise NotImplementedError

    def evaluated(self, weight: Tensor) -> Tensor:
        """The masked weight, in training too."""
        masked: Tensor = _Masked.apply(weight, self.scores, self.kept(), self.sharing)  # type: ignore[no-untyped-call]
        return masked

    def mask(self, weight: Tensor) -> Tensor:
        """Where the scores keep the weight."""
        return self.sharing.spread(self.kept() > 0).clone()

    def penalty(self, weight: Tensor) -> Tensor:
        """sum of sigmoid(score), each as often as it has weights; 0 for hard movement."""
        if not self.has_penalty:
            return super().penalty(weight)
        return torch.sigmoid(self.scores).sum() * self.sharing.size

    def add_penalty_gradient(self, weight: Parameter, strength: float) -> None:
        """In closed form."""
        if not self.has_penalty:
            return
        scores = self.scores.detach()
        slope = torch.sigmoid(scores).mul_(torch.sigmoid(-scores))  # exact for large scores, too
        accumulate(self.scores, slope, strength * self.sharing.size)


class TopScoresMask(_Scored):
    """The policy keeps the highest scores, as many as its schedule says.

    Args:
        has_penalty: whether the scores are regularised (soft movement) or not (hard movement).
    """

    chosen: Tensor
    gate_buffers: ClassVar[dict[str, str]] = {"chosen": "scores"}

    def __init__(self, sharing: Sharing, scores: Tensor, *, has_penalty: bool = False) -> None:
        super().__init__(sharing, scores)
        self.has_penalty = has_penalty
        self.register_buffer("chosen", torch.ones_like(scores), persistent=False)

    def kept(self) -> Tensor:
        """What the policy has chosen last."""
        return self.chosen

    def restore(self, mask: Tensor) -> None:
        """Take over what the policy had chosen."""
        self.chosen.copy_(self.sharing.gather(mask.to(self.scores.dtype)) > 0)


class ScoresAboveMask(_Scored):
    """All scores with sigmoid(score) above a fixed threshold are kept (soft movement)."""

    border: Tensor

    def __init__(self, sharing: Sharing, scores: Tensor) -> None:
        super().__init__(sharing, scores)
        border = torch.full((), -torch.inf, dtype=scores.dtype, device=scores.device)
        self.register_buffer("border", border, persistent=False)

    def set_threshold(self, threshold: float) -> None:
        """Keep where sigmoid(score) is above this from now on."""
        border = math.log(threshold / (1 - threshold)) if threshold > 0 else -math.inf
        self.border.fill_(border)

    def kept(self) -> Tensor:
        """Where the score is above the logit of the threshold."""
        return where_positive(self.scores.detach() - self.border)

    def margins(self, weight: Tensor) -> Tensor:
        """Scores above the logit of the threshold."""
        return self.scores.detach() - self.border

    def put_across(self, weight: Tensor, gates: Tensor, *, keep: bool) -> None:
        """By score."""
        put(self.scores, gates, self.border, above=keep)


class _Masked(MaskFunction):
    """weight * mask; dL/dscores = dL/dW' * weight, whether kept or not (eq. 4)."""

    @staticmethod
    def forward(weight: Tensor, scores: Tensor, kept: Tensor, sharing: Sharing) -> Tensor:
        return sharing.times(weight, kept)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        weight, _, kept, ctx.sharing = inputs
        ctx.save_for_backward(weight, kept)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        weight, kept = ctx.saved_tensors
        return ctx.sharing.times(grad, kept), ctx.sharing.gather(grad * weight), None, None
