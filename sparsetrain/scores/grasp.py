"""GraSP: what an untrained network's gradient flow loses with a weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsetrain.calibration import Calibration
from sparsetrain.candidates import Candidate
from sparsetrain.curvature.evaluating import evaluating, wanting
from sparsetrain.scores.base import Score


class GraSP(Score):
    """w (H g), by which removing w lowers the gradient's squared norm, to first order.

    Wang et al. 2020, "Picking winning tickets before training by preserving gradient flow", eq. 8.
    They call -w (H g) the score and remove the highest; here the highest stay, as with every
    score. H g is of the mean loss over all samples, with the logits divided by `temperature`.
    """

    kind: Literal["grasp"] = "grasp"
    scope: ClassVar[Literal["row", "layer", "global"]] = "global"
    data: ClassVar[Literal["none", "inputs", "loss"]] = "loss"

    temperature: float = Field(
        200.0, gt=0, description="divides the outputs, as in the authors' code"
    )

    def measure(
        self, model: nn.Module, candidates: Sequence[Candidate], calibration: Calibration
    ) -> dict[str, Tensor]:
        """w (H g), of the weight's shape; of either sign. The batches are read twice."""
        params = [candidate.param for candidate in candidates]
        cooled = _cooled(calibration, self.temperature)
        gradients = list(cooled.mean_gradients(model, candidates, self.kind).values())
        curved = [torch.zeros_like(param) for param in params]
        samples = 0
        with evaluating(model), wanting(model, params), sdpa_kernel(SDPBackend.MATH):
            for batch in cooled.read(model, self.kind):
                samples += batch.size
                total = cooled.total_loss(model, batch, self.kind)
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
        return {
            c.name: c.param.detach() * value / samples
            for c, value in zip(candidates, curved, strict=True)
        }


def _cooled(calibration: Calibration, temperature: float) -> Calibration:
    batches, loss_fn = calibration.given("grasp")
    if iter(batches) is batches:
        raise ValueError("score 'grasp' reads the batches twice: give a list or a DataLoader")

    def loss(outputs: Any, targets: Any) -> Tensor:
        if not isinstance(outputs, Tensor):
            raise ValueError("score 'grasp' needs a model that returns a tensor of logits")
        return loss_fn(outputs / temperature, targets)

    return Calibration(batches, loss, calibration.adapter, calibration.seed, calibration.progress)
