"""Gradient magnitude |dL/dw|."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from sparsetrain.calibration import Calibration
from sparsetrain.candidates import Candidate
from sparsetrain.scores.base import Needs, Score, gradient_of


class Gradient(Score):
    """|dL/dw| of the current step (the growth signal of RigL, Evci et al. 2020).

    Of a whole model: of the mean loss over all samples.
    """

    kind: Literal["gradient"] = "gradient"
    data: ClassVar[Needs] = "loss"

    def measure(
        self, model: nn.Module, candidates: Sequence[Candidate], calibration: Calibration
    ) -> dict[str, Tensor]:
        """|g|, of the weight's shape."""
        gradients = calibration.mean_gradients(model, candidates, self.title)
        return {name: gradient.abs_() for name, gradient in gradients.items()}

    def of(
        self, name: str, param: Parameter, state: Mapping[str, Any], generator: torch.Generator
    ) -> Tensor:
        """|g|, of the weight's shape."""
        return gradient_of(name, param, self.kind).abs()
