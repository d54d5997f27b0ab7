"""SNIP: connection sensitivity of an untrained network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from sparsetrain.calibration import Calibration
from sparsetrain.candidates import Candidate
from sparsetrain.part import part_of
from sparsetrain.scores.base import Needs, Scope, Score, gradient_of


class SNIP(Score):
    """|w dL/dw| at initialisation, as a share of the sum over the network.

    Lee et al. 2019, "SNIP: single-shot network pruning based on connection sensitivity", eq. 6. The
    gradient is that of the mean loss over all samples.
    """

    kind: Literal["snip"] = "snip"
    scope: ClassVar[Scope] = "global"
    data: ClassVar[Needs] = "loss"

    def measure(
        self, model: nn.Module, candidates: Sequence[Candidate], calibration: Calibration
    ) -> dict[str, Tensor]:
        """Sensitivities, of the weight's shape; they add up to 1 over all weights."""
        gradients = calibration.mean_gradients(model, candidates, self.title)
        found = {c.name: (c.param.detach() * gradients[c.name]).abs_() for c in candidates}
        total = sum(_sum(c, found[c.name]) for c in candidates)
        return {name: value / total for name, value in found.items()} if total else found

    def of(
        self, name: str, param: Parameter, state: Mapping[str, Any], generator: torch.Generator
    ) -> Tensor:
        """|w g| of the current step, of the weight's shape; not a share of anything."""
        return (param.detach() * gradient_of(name, param, self.kind)).abs_()


def _sum(candidate: Candidate, values: Tensor) -> float:
    """Of a sharded weight over all ranks."""
    part = part_of(candidate.name, candidate.param)
    return float(part.sum(part.held(values).sum(dtype=torch.float64).cpu()))
