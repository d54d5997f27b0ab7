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

from sparsetrain.learned.base import nearest_kept
from sparsetrain.sharded_selection import least_within
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
    gates = [gate for target in targets for gate in target.gates()]
    of_loss = _mean_size([part.held(g.grad) for g, part in gates if g.grad is not None], targets[0])
    gradients = [gradient for target in targets for gradient in target.penalty_gradients()]
    of_penalty = max(_mean_size(gradients, targets[0]), steering.least_pull)
    if of_loss > 0 and of_penalty > 0:
        strength = steering.start * of_loss / of_penalty
        memory[f"{budget.key}.strength"] = strength
        memory[f"{budget.key}.integral"] = math.log(strength)


def _mean_size(gradients: Sequence[Tensor], one: LearnedTarget) -> float:
    """Mean magnitude of gradients, added up over the ranks that one target is shared out over."""
    here = sum(float(gradient.abs().sum()) for gradient in gradients)
    numel = sum(gradient.numel() for gradient in gradients)
    total, count = one.part.sum(torch.tensor([here, numel], dtype=torch.float64)).tolist()
    return float(total / max(count, 1))


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
    distances, indices, sizes, parts = [], [], [], []
    for target in targets:
        margins, part = target.margins()
        margins = margins.reshape(-1)
        side = margins > 0 if drop else margins <= 0
        if drop:  # the best one stays, so that no layer is lost
            side[nearest_kept(margins, part)] = False
        found = (side & margins.isfinite()).nonzero().view(-1)
        distances.append(margins[found].abs())
        indices.append(found)
        sizes.append(target.learned.sharing.size)
        parts.append(part)
    first = parts[0]
    taken = least_within(
        distances,
        sizes,
        abs(surplus),
        first.sum,
        shards=[number * first.ranks + first.rank for number in range(len(targets))],
        total_shards=first.ranks * len(targets),
    )
    return {t.name: i[m] for t, i, m in zip(targets, indices, taken, strict=True)}
