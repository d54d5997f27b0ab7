"""Steering a learned mask to a sparsity: the strength of its penalty, and its last few gates.

The strength is a Lagrange multiplier of the constraint "so many weights are kept". Dual ascent
(Gallego-Posada et al. 2022, "Controlled sparsity via constrained optimization") raises it while
too many are, here in the logarithm, because its right size is not known by orders of magnitude. A
proportional part damps the swings (Stooke et al. 2020, "Responsive safety in reinforcement
learning by PID Lagrangian methods"). The count that is steered is the one of evaluation, while
the gradient comes from the penalty, its smooth stand-in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from sparsetrain.storage.learned import LearnedTarget

#: By how much the count may differ before gates are put across the border: a share of all weights,
#: and a share of those to keep, whichever is less.
_OF_ALL = 0.0025
_OF_KEPT = 0.05


@dataclass(frozen=True)
class Steering:
    """How strongly the multiplier answers.

    Attributes:
        start: its first value, against the size at which penalty and loss pull alike.
        gain: log-multiplier gained over the whole ramp by being too dense by a factor of e.
        damping: answer to the present error alone, in log-multiplier a unit of log density.
        least_pull: of the penalty on a gate, on average, for its first value; where decided gates
            hardly feel the penalty any more, it must not grow without end.
    """

    start: float = 0.01
    gain: float = 50.0
    damping: float = 30.0
    least_pull: float = 0.0


@dataclass(frozen=True)
class Budget:
    """Targets that share a number of weights to keep at the end.

    Attributes:
        key: of what is remembered for it.
    """

    key: str
    targets: Sequence[LearnedTarget]
    keep: int

    @property
    def numel(self) -> int:
        """Weights of the targets."""
        return sum(target.numel for target in self.targets)

    @property
    def tolerance(self) -> float:
        """Weights by which the count may differ at the end."""
        return min(_OF_ALL * self.numel, _OF_KEPT * self.keep)

    def rising(self, share: float) -> float:
        """Weights to keep when this share of the final sparsity should be reached."""
        return self.numel - share * (self.numel - self.keep)


def begin_strength(steering: Steering, memory: dict[str, Any], budget: Budget) -> None:
    """Find the first multiplier, from the gradients of the loss that are there.

    Without a gradient, or with a mask that has no penalty, there is none yet.
    """
    targets = [target for target in budget.targets if target.learned.has_penalty]
    if f"{budget.key}.strength" in memory or not targets:
        return
    gates = [gate for target in targets for gate in target.learned.gates()]
    of_loss = _mean_size(gates)
    parameters = [*gates, *(target.param for target in targets)]
    gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    for target in targets:
        target.learned.add_penalty_gradient(target.param, 1.0)
    of_penalty = max(_mean_size(gates), steering.least_pull)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    if of_loss > 0 and of_penalty > 0:
        strength = steering.start * of_loss / of_penalty
        memory[f"{budget.key}.strength"] = strength
        memory[f"{budget.key}.integral"] = math.log(strength)


def _mean_size(gates: Sequence[Parameter]) -> float:
    gradients = [gate.grad for gate in gates if gate.grad is not None]
    total = sum(float(gradient.abs().sum()) for gradient in gradients)
    return total / max(sum(gradient.numel() for gradient in gradients), 1)


def next_strength(
    steering: Steering,
    memory: dict[str, Any],
    key: str,
    error: float,
    updates: float,
    corrected: bool,
) -> None:
    """Change the multiplier after an update.

    Args:
        error: log of kept over wanted weights.
        updates: in the whole ramp.
        corrected: whether gates are put across the border, so that the error is gone.
    """
    step = steering.gain / updates * min(max(error, -1.0), 1.0)
    integral = memory[f"{key}.integral"] + step
    memory[f"{key}.integral"] = integral
    damping = 0.0 if corrected else steering.damping * error
    memory[f"{key}.strength"] = math.exp(min(integral + damping, 80.0))


def nearest_gates(targets: Sequence[LearnedTarget], surplus: int) -> Mapping[str, Tensor]:
    """The gates nearest to their border that together hold `surplus` weights, or just less.

    Args:
        surplus: weights to drop; negative for weights to take up again.

    Returns:
        Target name -> flat gate indices.
    """
    drop = surplus > 0
    distances, owners, indices, sizes = [], [], [], []
    for number, target in enumerate(targets):
        margins = target.learned.margins(target.param).reshape(-1)
        side = margins > 0 if drop else margins <= 0
        if drop:  # the best one stays, so that no layer is lost
            side[margins.argmax()] = False
        found = (side & margins.isfinite()).nonzero().view(-1)
        distances.append(margins[found].abs())
        indices.append(found)
        owners.append(torch.full_like(found, number))
        sizes.append(torch.full_like(found, target.learned.sharing.size))
    order = torch.cat(distances).argsort(stable=True)
    taken = order[torch.cat(sizes)[order].cumsum(0) <= abs(surplus)]
    owner, index = torch.cat(owners)[taken], torch.cat(indices)[taken]
    return {t.name: index[owner == number] for number, t in enumerate(targets)}
