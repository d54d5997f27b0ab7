"""First-order Taylor importance |w * dL/dw|."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from sparsetrain.scores.base import Score, gradient_of


class Taylor(Score):
    """|w g|, the first-order change of the loss when w is removed (Molchanov et al. 2019, eq. 7).

    Here g is the gradient of the current step, averaged over its batch.
    """

    kind: Literal["taylor"] = "taylor"

    def of(
        self, name: str, param: Parameter, state: Mapping[str, Any], generator: torch.Generator
    ) -> Tensor:
        """|w g|, of the weight's shape."""
        return (param.detach() * gradient_of(name, param, self.kind)).abs_()
