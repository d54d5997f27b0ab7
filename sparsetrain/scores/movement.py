"""Movement away from zero, summed over training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from sparsetrain.calibration import Calibration
from sparsetrain.candidates import Candidate
from sparsetrain.scores.base import ACCUMULATED, Needs, Score, gradient_of


class MovementScore(Score):
    """sum over steps of -w g, g being the gradient of the step (Sanh et al. 2020, eq. 5).

    Positive where gradient descent moved the weight away from zero. It is what `Movement` learns
    with plain gradient descent, but for the learning rate, as long as no weight is masked.
    """

    kind: Literal["movement"] = "movement"
    data: ClassVar[Needs] = "loss"
    accumulates: ClassVar[bool] = True

    def measure(
        self, model: nn.Module, candidates: Sequence[Candidate], calibration: Calibration
    ) -> dict[str, Tensor]:
        """-w g with the gradient of the mean loss, of the weight's shape: the first step's."""
        gradients = calibration.mean_gradients(model, candidates, self.title)
        return {c.name: -(c.param.detach() * gradients[c.name]) for c in candidates}

    def observe(self, name: str, param: Parameter, seen: Tensor | None) -> Tensor | None:
        """The sum with this step's -w g in it; layers that the step did not use keep theirs."""
        if param.grad is None:
            return seen
        moved = -(param.detach() * param.grad.detach())
        moved = torch.nan_to_num(moved, 0.0, 0.0, 0.0)  # one bad batch must not stay for good
        return moved if seen is None else seen.add_(moved)

    def of(
        self, name: str, param: Parameter, state: Mapping[str, Any], generator: torch.Generator
    ) -> Tensor:
        """The sum so far, of the weight's shape; -w g of this step when nothing was summed."""
        seen: Tensor | None = state.get(ACCUMULATED)
        if seen is not None:
            return seen
        return -(param.detach() * gradient_of(name, param, self.kind))
