"""Random importance, the control of every experiment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from sparsetrain.scores.base import Score


class Random(Score):
    """Uniform random numbers in [0, 1) from the optimizer's seeded generator."""

    kind: Literal["random"] = "random"

    def of(
        self, name: str, param: Parameter, state: Mapping[str, Any], generator: torch.Generator
    ) -> Tensor:
        """Random numbers of the weight's shape."""
        return torch.rand(param.shape, generator=generator).to(param.device)
