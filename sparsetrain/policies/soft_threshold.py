"""Soft threshold weight reparameterisation (Kusupati et al. 2020, STR)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from sparsetrain.candidates import Candidate
from sparsetrain.learned.base import gates_like
from sparsetrain.learned.sharing import Sharing, share
from sparsetrain.learned.soft_threshold import SoftThresholdMask
from sparsetrain.part import Part
from sparsetrain.policies.control import Budget
from sparsetrain.policies.group import TargetGroup
from sparsetrain.policies.learned import LearnedPolicy
from sparsetrain.sharded_selection import radix_threshold
from sparsetrain.storage.learned import LearnedTarget

#: Weights within this distance of s tell how many would be dropped next.
_NEAR = 0.1


class SoftThreshold(LearnedPolicy):
    """sign(w) relu(|w| - g(s)) with a learned s for each layer (Kusupati et al. 2020, eq. 3).

    Thresholds rise by weight decay on s, which is negative, and fall where the loss wants its
    weights. With `strength` that decay decides the sparsity, as in the paper. With `sparsity` there
    is no decay: all s are shifted together at each update, so that exactly as many weights are
    above their thresholds as the schedule says, and the loss decides how layers differ.
    """

    kind: Literal["soft_threshold"] = "soft_threshold"
    moves_in_log_odds: ClassVar[bool] = False

    per: Literal["layer", "output"] = Field(
        "layer", description="one threshold for the layer, or one for each output (channel)"
    )
    curve: Literal["sigmoid", "exponential"] = Field("sigmoid", description="g")
    initial: float = Field(-10.0, description="s at the start; the paper's is -3200")

    def learned_mask(self, candidate: Candidate, generator: torch.Generator) -> SoftThresholdMask:
        """Thresholds that start at g(initial)."""
        shape = tuple(candidate.param.shape)
        if self.per == "output":
            gates = share("output", shape, transposed=candidate.is_transposed).gates
        else:
            gates = (1,) * len(shape)
        sharing = Sharing(shape, shape, gates)
        start = gates_like(candidate.param, torch.full(gates, self.initial))
        return SoftThresholdMask(sharing, start, self.curve)

    def group_options(self, options: dict[str, Any]) -> dict[str, Any]:
        """The weights' own learning rate, as in the paper; decay by `strength`."""
        own = {"lr": self.mask_lr or options.get("initial_lr", options["lr"])}
        if "weight_decay" in options:
            own["weight_decay"] = self.strength or 0.0
        elif self.strength:
            raise ValueError(
                "SoftThreshold's 'strength' is the weight decay of its thresholds, which this "
                "optimizer does not have; give 'sparsity' instead"
            )
        return own

    def observe(self, group: TargetGroup, step: int) -> None:
        """Project the gradients of s on the surface of equal counts: their level is not the loss's
        to choose, only how layers differ."""
        super().observe(group, step)
        for budget in self.budgets(group):
            pairs = []
            for target in budget.targets:
                gate, part = target.gates()[0]
                if gate.grad is not None and _crossing(target) in group.memory:
                    normal = part.held(group.memory[_crossing(target)])
                    pairs.append((part.held(gate.grad), normal))
            here = [
                sum(float(normal.square().sum()) for _, normal in pairs),
                sum(float((grad * normal).sum()) for grad, normal in pairs),
            ]
            total = budget.targets[0].part.sum(torch.tensor(here, dtype=torch.float64))
            norm, along = total.tolist()
            if norm:
                level = along / norm
                for grad, normal in pairs:
                    grad.sub_(normal, alpha=level)

    def _steer(
        self, group: TargetGroup, budget: Budget, step: int
    ) -> dict[str, Callable[[], None]]:
        """Shift every s of the budget by the same amount."""
        keep = round(self.wanted(budget, step))
        found = [_levels(target) for target in budget.targets]
        levels = torch.cat([of_target.reshape(-1) for of_target in found])
        level = 0.0
        if keep < budget.numel:
            level = _between(levels, budget.numel - keep, budget.targets[0].part)
        for target, of_target in zip(budget.targets, found, strict=True):
            near = ((of_target - level).abs() < _NEAR).to(levels.dtype)
            group.memory[_crossing(target)] = _a_threshold(target, near) / (2 * _NEAR)
        return {t.name: partial(_shift, t, level) for t in budget.targets}

    def remembers(self, group: TargetGroup) -> dict[str, Tensor]:
        """How many weights each threshold would drop."""
        if not self.is_steered:
            return {}
        targets = group.held_as(LearnedTarget)
        return {_crossing(t): torch.zeros_like(t.gates()[0][0].detach()) for t in targets}


def _levels(target: LearnedTarget) -> Tensor:
    """The s at which each weight that is here would be just dropped, less the present s."""
    with target.changing_gates() as mask:
        assert isinstance(mask, SoftThresholdMask)
        return mask.levels(target.exact_weight())


def _shift(target: LearnedTarget, level: float) -> None:
    with target.changing_gates() as mask:
        assert isinstance(mask, SoftThresholdMask)
        mask.shift(level)


def _a_threshold(target: LearnedTarget, near: Tensor) -> Tensor:
    """Sums over the weights of each threshold, of the thresholds' shape."""
    gate, part = target.gates()[0]
    if part.is_whole or gate.shape[0] == target.shape[0]:  # as many rows, shared out alike
        rest = (n if g > 1 else 1 for n, g in zip(near.shape[1:], gate.shape[1:], strict=True))
        rows = near.shape[0] if gate.shape[0] == target.shape[0] else 1
        return part.wrap(near.sum_to_size((rows, *rest)))
    everywhere = target.part.sum(near.sum_to_size((1,) * near.dim()).cpu()).to(near.device)
    return part.wrap(part.held(everywhere))


def _between(levels: Tensor, below: int, part: Part) -> float:
    """A level with exactly so many below it, as far from its neighbours as can be, so that
    rounding decides nothing."""
    last = _kth_smallest(levels, below, part)
    above = levels[levels > last]
    first = part.lowest(float(above.min()) if above.numel() else math.inf)
    if math.isfinite(last) and math.isfinite(first):
        return (last + first) / 2
    return last if math.isfinite(last) else min(first, 0.0) - _NEAR


def _crossing(target: LearnedTarget) -> str:
    """Key of: how many weights a threshold drops when its s rises, a unit of s."""
    return f"{target.name}.crossing"


def _kth_smallest(levels: Tensor, k: int, part: Part) -> float:
    if part.is_whole:
        return float(levels.kthvalue(k).values)
    largest = torch.finfo(levels.dtype).max  # stands for infinity, which has no place in an order
    finite = levels.clamp(-largest, largest)
    found = -radix_threshold([-finite], k, part.sum)
    return math.copysign(math.inf, found) if abs(found) == largest else found
