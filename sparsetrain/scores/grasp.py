"""GraSP: what an untrained network's gradient flow loses with a weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsetrain.calibration import Calibration
from sparsetrain.candidates import Candidate
from sparsetrain.evaluating import evaluating, wanting
from sparsetrain.scores.base import Needs, Scope, Score


class GraSP(Score):
    """w (H g), by which removing w lowers the gradient's squared norm, to first order.

    Wang et al. 2020, "Picking winning tickets before training by preserving gradient flow", eq. 8.
    They call -w (H g) the score and remove the highest; here the highest stay, as with every
    score. H g is of the mean loss over all samples, with the logits divided by `temperature`.
    """

    kind: Literal["grasp"] = "grasp"
    scope: ClassVar[Scope] = "global"
    data: ClassVar[Needs] = "loss"

    temperature: float = Field(
        200.0, gt=0, description="divides the outputs, as in the authors' code"
    )

    @property
    def needs_whole(self) -> str | None:
        """A second derivative does."""
        return "takes second derivatives"

    def measure(
        self, model: nn.Module, candidates: Sequence[Candidate], calibration: Calibration
    ) -> dict[str, Tensor]:
        """w (H g), of the weight's shape; of either sign. The batches are read twice."""
        params = [candidate.param for candidate in candidates]
        cooled = _cooled(calibration, self.temperature, self.title)
        gradients = list(cooled.mean_gradients(model, candidates, self.title).values())
        curved = [torch.zeros_like(param) for param in params]
        samples = 0
        with evaluating(model), wanting(model, params), sdpa_kernel(SDPBackend.MATH):
            for batch in cooled.read(model, self.title):
                samples += batch.size
                total = cooled.total_loss(model, batch, self.title)
                found = torch.autograd.grad(total, params, create_graph=True, allow_unused=True)
                along = sum(
                    (own * whole).sum()
                    for own, whole in zip(found, gradients, strict=True)
                    if own is not None and own.requires_grad
                )
                if not isinstance(along, Tensor):
                    continue  # the loss is linear in every weight
                second = torch.autograd.grad(along, params, allow_unused=True)
                for known, value in zip(curved, second, strict=True):
                    if value is not None:
                        known += value
        (samples,) = cooled.ranks.totals(samples)
        return {
            c.name: c.param.detach() * cooled.ranks.sum(value) / samples
            for c, value in zip(candidates, curved, strict=True)
        }


def _cooled(calibration: Calibration, temperature: float, who: str) -> Calibration:
    """The same data with the outputs divided by a temperature before the loss."""
    _, loss_fn = calibration.given(who)
    calibration.require_rereadable(who)

    def loss(outputs: Any, targets: Any) -> Tensor:
        if not isinstance(outputs, Tensor):
            raise ValueError(f"{who} needs a model that returns a tensor of logits")
        return loss_fn(outputs / temperature, targets)

    return replace(calibration, loss_fn=loss)
