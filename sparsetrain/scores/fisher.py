"""Fisher importance: 1/2 F w^2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import Parameter

from sparsetrain.calibration import Calibration, require_reached
from sparsetrain.candidates import Candidate
from sparsetrain.curvature import fisher_diagonal
from sparsetrain.scores.base import ACCUMULATED, Needs, Score, gradient_of


class Fisher(Score):
    """1/2 F w^2, the loss that removing w costs, with the Fisher matrix's diagonal for curvature.

    Theis et al. 2018, "Faster gaze prediction with dense networks and Fisher pruning", eq. 8. Of a
    whole model F is the mean over samples of squared per-sample gradients. In training, where
    there is one gradient a step, it is the sum over steps of the squared gradient of the batch, as
    in WoodFisher (Singh & Alistarh 2020, section 3), whose size means nothing and whose order does.
    """

    kind: Literal["fisher"] = "fisher"
    data: ClassVar[Needs] = "loss"
    accumulates: ClassVar[bool] = True

    labels: Literal["data", "model"] = Field(
        "data",
        description="'data' for the empirical Fisher matrix, 'model' for labels drawn from "
        "the model's softmax; whole models only",
    )

    @property
    def needs_whole(self) -> str | None:
        """Per-sample gradients do."""
        return "takes the gradient of each sample"

    def measure(
        self, model: nn.Module, candidates: Sequence[Candidate], calibration: Calibration
    ) -> dict[str, Tensor]:
        """1/2 F w^2, of the weight's shape."""
        diagonal = fisher_diagonal(
            model,
            *calibration.given(self.title),
            labels=self.labels,
            parameters=[c.name for c in candidates],
            seed=calibration.seed,
            **calibration.options,
        )
        means = calibration.ranks.mean(diagonal, diagonal.samples)
        return weighted(candidates, means, self.title)

    def observe(self, name: str, param: Parameter, seen: Tensor | None) -> Tensor | None:
        """The sum with this step's g^2 in it; layers that the step did not use keep theirs."""
        if param.grad is None:
            return seen
        square = torch.nan_to_num(param.grad.detach().square(), 0.0, 0.0, 0.0)
        return square if seen is None else seen.add_(square)

    def of(
        self, name: str, param: Parameter, state: Mapping[str, Any], generator: torch.Generator
    ) -> Tensor:
        """1/2 w^2 times the sum so far, or times g^2 of this step when nothing was summed."""
        seen: Tensor | None = state.get(ACCUMULATED)
        squares = gradient_of(name, param, self.kind).square() if seen is None else seen
        return 0.5 * param.detach().square() * squares


def weighted(
    candidates: Sequence[Candidate], diagonal: Mapping[str, Tensor], who: str
) -> dict[str, Tensor]:
    """1/2 h w^2 for each weight.

    Raises:
        ValueError: a weight has no curvature at all, as the data do not reach it.
    """
    names = [candidate.name for candidate in candidates]
    require_reached(names, {name for name in names if diagonal[name].any()}, who)
    return {c.name: 0.5 * diagonal[c.name] * c.param.detach().square() for c in candidates}
