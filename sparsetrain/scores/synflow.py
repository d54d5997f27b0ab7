"""SynFlow: data-free synaptic flow."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsetrain.calibration import Calibration
from sparsetrain.candidates import Candidate
from sparsetrain.scores.base import Needs, Scope, Score


class SynFlow(Score):
    """w dR/dw, R being the sum of the outputs for inputs of 1 when every weight is its magnitude.

    Tanaka et al. 2020, "Pruning neural networks without any data by iteratively conserving synaptic
    flow", eq. 4. Of the batches only the shape of the first sample is looked at. Computed in
    float64, as the product over layers overflows. Biases and norms count with their magnitudes,
    too, as in the authors' code.
    """

    kind: Literal["synflow"] = "synflow"
    scope: ClassVar[Scope] = "global"
    data: ClassVar[Needs] = "inputs"

    rounds: int = Field(
        100, ge=1, description="in which pruning goes, each with an equal share of what is left"
    )

    @property
    def pruning_rounds(self) -> int:
        """`rounds`."""
        return self.rounds

    @property
    def needs_whole(self) -> str | None:
        """A copy in float64 does."""
        return "computes on a copy of the model in float64"

    def measure(
        self, model: nn.Module, candidates: Sequence[Candidate], calibration: Calibration
    ) -> dict[str, Tensor]:
        """Synaptic flow through each weight, of the weight's shape, float64; not negative."""
        batch = next(iter(calibration.read(model, self.title, needs_targets=False))).part(0, 1)
        twin = copy.deepcopy(model).double().eval()
        with torch.no_grad():
            for tensor in (*twin.parameters(), *twin.buffers()):
                if tensor.is_floating_point():
                    tensor.abs_()
        for parameter in twin.parameters():
            parameter.requires_grad_(True)
        args, kwargs = pytree.tree_map(_ones, (batch.args, batch.kwargs))
        outputs = [t for t in pytree.tree_leaves(twin(*args, **kwargs)) if isinstance(t, Tensor)]
        params = [twin.get_parameter(candidate.name) for candidate in candidates]
        flow = torch.stack([output.sum() for output in outputs]).sum()
        found = torch.autograd.grad(flow, params, allow_unused=True)
        flows = {}
        for c, param, gradient in zip(candidates, params, found, strict=True):
            given = torch.zeros_like(param) if gradient is None else gradient
            flows[c.name] = param.detach() * given
        return flows


def _ones(leaf: object) -> object:
    if isinstance(leaf, Tensor) and leaf.is_floating_point():
        return torch.ones_like(leaf, dtype=torch.float64)
    return leaf
