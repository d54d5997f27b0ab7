"""Magnitude of the base optimizer's momentum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from sparsetrain.calibration import Calibration
from sparsetrain.candidates import Candidate
from sparsetrain.scores.base import Score

_MOMENTUM_KEYS = ("momentum_buffer", "exp_avg", "mu", "momentum")


class Momentum(Score):
    """|m|, m being the base optimizer's running mean of the gradient (Dettmers 2019)."""

    kind: Literal["momentum"] = "momentum"

    def measure(
        self, model: nn.Module, candidates: Sequence[Candidate], calibration: Calibration
    ) -> dict[str, Tensor]:
        """Refused: a model as it is has no momentum."""
        raise ValueError(f"{self.title} is an optimizer's, in training: it is for policies alone")

    def of(
        self, name: str, param: Parameter, state: Mapping[str, Any], generator: torch.Generator
    ) -> Tensor:
        """|m|, of the weight's shape."""
        for key in _MOMENTUM_KEYS:
            value = state.get(key)
            if isinstance(value, Tensor) and value.shape == param.shape:
                return value.detach().abs()
        raise ValueError(
            f"score 'momentum' finds no momentum of {name} in the base optimizer: use one with "
            "momentum, and update after its first step"
        )
