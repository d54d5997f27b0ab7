"""Fisher information of gates on a layer's channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from sparsetrain.calibration import Calibration, require_reached
from sparsetrain.candidates import Candidate
from sparsetrain.curvature.evaluating import evaluating
from sparsetrain.scores.base import Score


class GateFisher(Score):
    """1/2 mean over samples of (dL/dgate)^2, for a gate of 1 on every output channel.

    The gradient of a gate is the sum over positions of output times its gradient (Theis et al.
    2018, eq. 9; Liu et al. 2021, "Group Fisher pruning", eq. 4).
    """

    kind: Literal["gate_fisher"] = "gate_fisher"
    data: ClassVar[Literal["none", "inputs", "loss"]] = "loss"
    per_channel: ClassVar[bool] = True

    def measure(
        self, model: nn.Module, candidates: Sequence[Candidate], calibration: Calibration
    ) -> dict[str, Tensor]:
        """[channels]"""
        sums: dict[str, Tensor] = {}
        calls: list[tuple[Candidate, Tensor]] = []
        samples = 0

        def hook(candidate: Candidate) -> Any:
            return lambda module, args, output: calls.append((candidate, output))

        handles = []
        for candidate in candidates:
            candidate.require_forward(f"score {self.kind!r}")
            handles += [owner.register_forward_hook(hook(candidate)) for owner in candidate.owners]
        try:
            with evaluating(model):
                for batch in calibration.read(model, self.kind):
                    calls.clear()
                    total = calibration.total_loss(model, batch, self.kind)
                    samples += batch.size
                    _add_squares(sums, total, calls)
        finally:
            for handle in handles:
                handle.remove()
        require_reached([c.name for c in candidates], set(sums), f"score {self.kind!r}")
        return {name: 0.5 * total / samples for name, total in sums.items()}


def _add_squares(
    sums: dict[str, Tensor], total: Tensor, calls: Sequence[tuple[Candidate, Tensor]]
) -> None:
    outputs = [output for _, output in calls]
    backs: Sequence[Tensor | None] = torch.autograd.grad(total, outputs, allow_unused=True)
    gates: dict[str, Tensor] = {}
    for (candidate, output), back in zip(calls, backs, strict=True):
        if back is None:
            continue
        products = output.detach() * back
        is_linear = isinstance(candidate.owners[0], nn.Linear)
        products = products.movedim(-1 if is_linear else 1, 1)
        gate = products.flatten(2).sum(2) if products.dim() > 2 else products
        gates[candidate.name] = gates[candidate.name] + gate if candidate.name in gates else gate
    for name, gate in gates.items():
        square = gate.square().sum(0)
        sums[name] = sums[name] + square if name in sums else square
