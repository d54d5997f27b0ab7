"""First-order Taylor importance |w * dL/dw|."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import Parameter

from sparsetrain.calibration import Calibration
from sparsetrain.candidates import Candidate
from sparsetrain.curvature import fisher_diagonal, iterate_per_sample_gradients
from sparsetrain.scores.base import Needs, Score, gradient_of


class Taylor(Score):
    """|w g|, the first-order change of the loss when w is removed, or its square.

    Molchanov et al. 2019, "Importance estimation for neural network pruning", eq. 7 (|w g| is
    the root of what they sum) and Molchanov et al. 2017, eq. 7. In training g is the gradient of
    the current step, averaged over its batch. Of a whole model the importance is averaged over
    batches or samples.
    """

    kind: Literal["taylor"] = "taylor"
    data: ClassVar[Needs] = "loss"

    squared: bool = Field(False, description="(w g)^2 instead of |w g|")
    per: Literal["batch", "sample"] = Field(
        "batch", description="whose gradients are taken one by one; 'sample' is for whole models"
    )

    @property
    def needs_whole(self) -> str | None:
        """Gradients of single samples do."""
        return "takes the gradient of each sample" if self.per == "sample" else None

    def measure(
        self, model: nn.Module, candidates: Sequence[Candidate], calibration: Calibration
    ) -> dict[str, Tensor]:
        """Mean of |w g| or (w g)^2 over batches or samples, of the weight's shape."""
        weights = {c.name: c.param.detach() for c in candidates}
        if self.per == "batch":
            batches = calibration.gradients(model, candidates, self.title)
            parts = ({n: g / size for n, g in found.items()} for size, found in batches)
            return _mean({n: self._of(weights[n], g) for n, g in part.items()} for part in parts)
        given = (model, *calibration.given(self.title))
        if self.squared:
            options = {"parameters": weights, **calibration.options}
            diagonal = fisher_diagonal(*given, **options)
            squares = calibration.ranks.mean(diagonal, diagonal.samples)
            return {n: weights[n].square() * squares[n] for n in weights}
        chunks = iterate_per_sample_gradients(*given, parameters=weights, **calibration.options)
        samples, sums = 0, {n: torch.zeros_like(w) for n, w in weights.items()}
        for chunk in chunks:
            samples += len(next(iter(chunk.values())))
            for n, gradient in chunk.items():
                sums[n] += (weights[n] * gradient).abs_().sum(0)
        (samples,) = calibration.ranks.totals(samples)
        return {n: calibration.ranks.sum(total) / samples for n, total in sums.items()}

    def of(
        self, name: str, param: Parameter, state: Mapping[str, Any], generator: torch.Generator
    ) -> Tensor:
        """|w g| or (w g)^2, of the weight's shape."""
        if self.per == "sample":
            raise ValueError(
                "score 'taylor' with per='sample' is for st.score and st.prune: a training step "
                "has the gradient of its batch alone"
            )
        return self._of(param.detach(), gradient_of(name, param, self.kind))

    def _of(self, weight: Tensor, gradient: Tensor) -> Tensor:
        product = weight * gradient
        return product.square_() if self.squared else product.abs_()


def _mean(parts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Mean of dicts of tensors."""
    sums: dict[str, Tensor] = {}
    number = 0
    for part in parts:
        number += 1
        for name, value in part.items():
            sums[name] = sums[name].add_(value) if name in sums else value
    return {name: total / number for name, total in sums.items()}
