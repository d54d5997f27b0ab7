"""Magnitude |w| (Han et al. 2015)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from sparsetrain.scores.base import Score


class Magnitude(Score):
    """|w|: small weights matter least.

    Han et al. 2015, "Learning both weights and connections for efficient neural networks".
    """

    kind: Literal["magnitude"] = "magnitude"

    def of(
        self, name: str, param: Parameter, state: Mapping[str, Any], generator: torch.Generator
    ) -> Tensor:
        """|w|, of the weight's shape."""
        return param.detach().abs()
