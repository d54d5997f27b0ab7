"""Fisher information of gates on a layer's channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from sparsetrain.calibration import Calibration, require_reached, watched
from sparsetrain.candidates import Candidate
from sparsetrain.evaluating import evaluating
from sparsetrain.scores.activation import channels_second
from sparsetrain.scores.base import Needs, Score


class GateFisher(Score):
    """1/2 mean over samples of (dL/dgate)^2, for a gate of 1 on every output channel.

    The gradient of a gate is the sum over positions of output times its gradient (Theis et al.
    2018, eq. 9; Liu et al. 2021, "Group Fisher pruning", eq. 4).
    """

    kind: Literal["gate_fisher"] = "gate_fisher"
    data: ClassVar[Needs] = "loss"
    per_channel: ClassVar[bool] = True

    @property
    def needs_whole(self) -> str | None:
        """Gradients of outputs do."""
        return "takes the gradient of each sample"

    def measure(
        self, model: nn.Module, candidates: Sequence[Candidate], calibration: Calibration
    ) -> dict[str, Tensor]:
        """[channels]"""
        sums: dict[str, Tensor] = {}
        calls: list[tuple[Candidate, Tensor]] = []
        samples = 0

        def see(candidate: Candidate, given: Tensor, output: Tensor) -> None:
            calls.append((candidate, output))

        with watched(candidates, self.title, see), evaluating(model):
            for batch in calibration.read(model, self.title):
                calls.clear()
                total = calibration.total_loss(model, batch, self.title)
                samples += batch.size
                _add_squares(sums, total, calls)
        ranks, names = calibration.ranks, [candidate.name for candidate in candidates]
        require_reached(names, ranks.seen_by(names, sums, every=True), self.title)
        (samples,) = ranks.totals(samples)
        return {name: 0.5 * ranks.sum(sums[name]) / samples for name in names}


def _add_squares(
    sums: dict[str, Tensor], total: Tensor, calls: Sequence[tuple[Candidate, Tensor]]
) -> None:
    outputs = [output for _, output in calls]
    backs: Sequence[Tensor | None] = torch.autograd.grad(total, outputs, allow_unused=True)
    gates: dict[str, Tensor] = {}
    for (candidate, output), back in zip(calls, backs, strict=True):
        if back is None:
            continue
        products = channels_second(candidate, output.detach() * back)
        gate = products.flatten(2).sum(2) if products.dim() > 2 else products
        gates[candidate.name] = gates[candidate.name] + gate if candidate.name in gates else gate
    for name, gate in gates.items():
        square = gate.square().sum(0)
        sums[name] = sums[name] + square if name in sums else square
