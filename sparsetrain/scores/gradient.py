"""Gradient magnitude |dL/dw|."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from sparsetrain.scores.base import Score, gradient_of


class Gradient(Score):
    """|dL/dw| of the current step (the growth signal of RigL, Evci et al. 2020)."""

    kind: Literal["gradient"] = "gradient"

    def of(
        self, name: str, param: Parameter, state: Mapping[str, Any], generator: torch.Generator
    ) -> Tensor:
        """|g|, of the weight's shape."""
        return gradient_of(name, param, self.kind).abs()
