"""Soft thresholds that are learned (Kusupati et al. 2020, STR)."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from sparsetrain.learned.base import LearnedMask, MaskFunction
from sparsetrain.learned.sharing import Sharing
from sparsetrain.part import Part

_STEP = 0.05
Curve = Literal["sigmoid", "exponential"]


class SoftThresholdMask(LearnedMask):
    """sign(w) relu(|w| - g(s)), with one s for the layer or for each output (eq. 3).

    Args:
        sharing: of the thresholds: their shape broadcasts against the weight.
        start: of s, of the thresholds' shape.
        curve: g, the sigmoid or the exponential function.
    """

    has_penalty = False

    def __init__(self, sharing: Sharing, start: Tensor, curve: Curve) -> None:
        super().__init__(sharing)
        self.curve = curve
        self.threshold_logit = Parameter(start)

    def threshold(self) -> Tensor:
        """g(s), of the thresholds' shape."""
        g = torch.sigmoid if self.curve == "sigmoid" else torch.exp
        return g(self.threshold_logit)

    def evaluated(self, weight: Tensor) -> Tensor:
        """The shrunken weight, in training too."""
        shrunken: Tensor = _SoftThreshold.apply(weight, self.threshold())  # type: ignore[no-untyped-call]
        return shrunken

    def mask(self, weight: Tensor) -> Tensor:
        """Where |w| is above the threshold."""
        return weight.abs() > self.threshold()

    def levels(self, weight: Tensor) -> Tensor:
        """The s at which each weight would be just dropped, less the layer's own s."""
        g_inverse = torch.logit if self.curve == "sigmoid" else torch.log
        levels = g_inverse(weight.abs())
        return torch.where(levels.isnan(), torch.inf, levels) - self.threshold_logit

    def shift(self, level: float) -> None:
        """Raise every s by the same amount."""
        self.threshold_logit.data.add_(level)

    def revive(self, weight: Tensor, rows: Part, gates: Part) -> None:
        """Lower every s until a weight is above its threshold; weights of 0 never are."""
        levels = self.levels(weight)
        highest = -rows.lowest(-float(levels.max()) if levels.numel() else math.inf)
        if math.isfinite(highest):
            self.shift(highest - _STEP)


class _SoftThreshold(MaskFunction):
    """Fewer passes than autograd's, and none that chooses by a bool."""

    @staticmethod
    def forward(weight: Tensor, threshold: Tensor) -> Tensor:
        return torch.copysign((weight.abs() - threshold).relu_(), weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.threshold_shape = inputs[1].shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (output,) = ctx.saved_tensors
        signs = output.sign()
        outwards = grad * signs
        return outwards * signs, -outwards.sum_to_size(ctx.threshold_shape)
