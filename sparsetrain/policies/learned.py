"""What policies share whose masks are learned by gradient descent."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sparsetrain.allocation import AllocationField, Global, active_total
from sparsetrain.candidates import Candidate
from sparsetrain.learned import LearnedMask
from sparsetrain.policies.base import Policy
from sparsetrain.policies.control import (
    Budget,
    Steering,
    begin_strength,
    nearest_gates,
    next_strength,
)
from sparsetrain.policies.group import TargetGroup
from sparsetrain.report.events import LayerChange
from sparsetrain.schedules import Schedule, UpdateSchedule
from sparsetrain.storage.learned import LearnedTarget
from sparsetrain.structures import Structure, Unstructured

_MEMORY_OF_SQUARES = 0.99
_TINY = 1e-30
_LARGEST_LR = 0.5
_RAMP = Schedule(shape="cubic", initial=0.0, final=1.0)


class LearnedPolicy(Policy):
    """A policy whose masks are parametrizations with parameters of their own, the gates.

    Gates join the wrapped optimizer as a parameter group. The gradient of their regulariser is
    added inside `step()`; the loss of the training loop stays as it is. Say how sparse with
    `strength`, the weight of the regulariser in the loss, or with `sparsity`; then the strength is
    steered so that evaluation keeps that share at the end (see `policies/control.py`).
    """

    dense_gradient: ClassVar[str] = "always"  # type: ignore[assignment]
    #: What may share a decision; most methods have other ways to say so.
    structures: ClassVar[tuple[type[Structure], ...]] = (Unstructured,)
    #: End of the rise of the sparsity, when the schedule gives none.
    default_stop: ClassVar[float] = 0.75
    #: How the strength is steered.
    steering: ClassVar[Steering] = Steering()
    #: Whether gates are numbers such as log-odds, that need steps of a size of their own.
    moves_in_log_odds: ClassVar[bool] = True

    allocation: AllocationField = Field(
        default_factory=Global,
        description="'global' leaves it to the gates which layer is how sparse; any other sets "
        "each layer's share and steers each by itself",
    )
    strength: float | None = Field(
        None, ge=0, description="weight of the regulariser in the loss; instead of 'sparsity'"
    )
    exact: bool = Field(
        False, description="whether the last step makes the count exact, to the last gate"
    )
    total_steps: int | None = Field(
        None, ge=1, description="optimizer steps in the whole training run"
    )
    update: UpdateSchedule = Field(
        default_factory=lambda: UpdateSchedule(every=10),
        description="when the sparsity is looked at (steps); it rises from `start` to `stop`",
    )
    warm_up: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of total_steps over which `strength` rises from 0, after update.start",
    )
    mask_lr: float | None = Field(
        None, gt=0, description="learning rate of the gates; null: one that fits total_steps"
    )

    @model_validator(mode="after")
    def _one_way_to_be_sparse(self) -> LearnedPolicy:
        asked = self.sparsity is not None or self.allocation.fixes_density
        if asked == (self.strength is not None) and self._takes_strength():
            raise ValueError(
                f"{type(self).__name__} needs either 'sparsity', which is then steered to, or "
                "'strength', the weight of its regulariser; give one of them"
            )
        if (asked or self.warm_up) and self.total_steps is None:
            raise ValueError("'total_steps' is missing: the sparsity has to know when to be there")
        if self.exact and not asked:
            raise ValueError("'exact' needs a 'sparsity' to be exact about")
        self.update.stop_step(self.total_steps, self.default_stop)
        return self

    def _structure_fits(self) -> None:
        if not isinstance(self.structure, self.structures):
            raise ValueError(f"{type(self).__name__} has no structure {self.structure.kind!r}")

    def _takes_strength(self) -> bool:
        return True

    def _needs_sparsity(self) -> bool:
        return False

    def with_sparsity(self, sparsity: float) -> LearnedPolicy:
        """The same policy asked for another sparsity, instead of a strength."""
        data = {**self.model_dump(), "sparsity": sparsity, "strength": None}
        return type(self).model_validate(data)

    @property
    def is_steered(self) -> bool:
        """Whether a sparsity was asked for."""
        return self.sparsity is not None or self.allocation.fixes_density

    # Gates.

    @abstractmethod
    def learned_mask(self, candidate: Candidate, generator: torch.Generator) -> LearnedMask:
        """The parametrization of a weight, with gates that have just begun.

        Raises:
            ValueError: the weight or its layer does not fit; the message names it.
        """

    def group_options(self, options: dict[str, Any]) -> dict[str, Any]:
        """Options of the gates' parameter group, from those of the weights'."""
        own: dict[str, Any] = {"lr": self.mask_lr or self._default_lr(options)}
        if "weight_decay" in options:
            own["weight_decay"] = 0.0
        return own

    def _default_lr(self, options: dict[str, Any]) -> float:
        # A gate has to be able to cross its range many times over, also while the learning rate
        # falls; else many gates end undecided. The papers' 1e-3 is for 120,000 steps.
        steps = self.total_steps or 100_000
        return min(300.0 / steps, _LARGEST_LR) * (1 - float(options.get("momentum", 0.0)))

    # Counts.

    def target_densities(self, group: TargetGroup) -> dict[str, float]:
        """Each layer's density, where the allocation sets it."""
        if isinstance(self.allocation, Global) or not self.is_steered:
            return {}
        return super().target_densities(group)

    def initial_masks(self, group: TargetGroup) -> dict[str, Tensor]:
        """None: gates decide. But what is asked for has to be possible."""
        if self.is_steered:
            self.counts(group)
        return {}

    def budgets(self, group: TargetGroup) -> list[Budget]:
        """Which targets share how many weights to keep."""
        if not self.is_steered:
            return []
        targets = group.held_as(LearnedTarget)
        if isinstance(self.allocation, Global):
            assert self.sparsity is not None
            numel = sum(target.numel for target in targets)
            return [Budget("all", targets, active_total(numel, self.sparsity))]
        if "keep" not in group.memory:  # asked for at every step
            group.memory["keep"] = self.counts(group)
        keep: dict[str, int] = group.memory["keep"]
        return [Budget(t.name, [t], keep[t.name]) for t in targets]

    # Around a step.

    def update_is_due(self, step: int) -> bool:
        """Every few steps from the schedule's start to the end of training, and at the last."""
        if self.total_steps is not None and step == self.total_steps - 1:
            return True
        return step >= self.update.start and (step - self.update.start) % self.update.every == 0

    def reached(self, step: int) -> float:
        """Share of the final sparsity that should be reached, in [0, 1]; cubic."""
        return _RAMP.at(self.progress(step))

    def progress(self, step: int) -> float:
        """Position between the schedule's start and stop after this step, in [0, 1]."""
        start = self.update.start
        share = (step + 1 - start) / max(self._end_of_ramp() - start, 1)
        return min(max(share, 0.0), 1.0)

    def wanted(self, budget: Budget, step: int) -> float:
        """Weights of the budget to keep after this step."""
        return budget.rising(self.reached(step))

    def observe(self, group: TargetGroup, step: int) -> None:
        """Add the gradient of the regulariser, and bring gradients of gates to a common size."""
        if step >= self.update.start:
            for budget in self.budgets(group):
                begin_strength(self.steering, group.memory, budget)
        for target, strength in self._strengths(group, step):
            target.add_penalty_gradient(strength)
        if group.memory.get("normalises", False):
            for target in group.held_as(LearnedTarget):
                self._normalise(group, target)

    def penalty(self, group: TargetGroup, step: int) -> Tensor | None:
        """The regulariser of all targets with the strength of this step."""
        parts = [strength * target.penalty() for target, strength in self._strengths(group, step)]
        return torch.stack(parts).sum() if parts else None

    def _strengths(self, group: TargetGroup, step: int) -> list[tuple[LearnedTarget, float]]:
        """The weight of each target's regulariser in the loss; targets without one are left out."""
        targets = [t for t in group.held_as(LearnedTarget) if t.learned.has_penalty]
        if step < self.update.start:
            return []
        if self.strength is not None:
            risen = 1.0
            if self.warm_up:
                assert self.total_steps is not None
                risen = min((step - self.update.start) / (self.warm_up * self.total_steps), 1.0)
            return [(target, self.strength * risen) for target in targets]
        found = []
        for budget in self.budgets(group):
            strength = group.memory.get(f"{budget.key}.strength")
            if strength is not None:
                found += [(t, strength) for t in budget.targets if t.learned.has_penalty]
        return found

    def _normalise(self, group: TargetGroup, target: LearnedTarget) -> None:
        """Divide each gradient by its running root mean square, as Adam and RMSprop do.

        The gradients of open, closed and undecided gates differ by orders of magnitude, so that one
        learning rate cannot move them all.
        """
        for number, (gate, part) in enumerate(target.gates()):
            if gate.grad is None:
                continue
            key = _square(target, number)
            gradient = part.held(gate.grad)
            square = gradient.square()
            if key in group.memory:
                square.lerp_(part.held(group.memory[key]), _MEMORY_OF_SQUARES)
            group.memory[key] = part.wrap(square)
            gradient.div_(square.sqrt().add_(_TINY))

    def remembers(self, group: TargetGroup) -> dict[str, Tensor]:
        """The squares of the gates' gradients."""
        if not group.memory.get("normalises", False):
            return {}
        return {
            _square(target, number): torch.zeros_like(gate.detach())
            for target in group.held_as(LearnedTarget)
            for number, (gate, _) in enumerate(target.gates())
        }

    # Steering.

    def update_masks(self, group: TargetGroup, step: int) -> None:
        """Look at the sparsity; change the strength, and single gates when the ramp is over."""
        moves: dict[str, Callable[[], None]] = {}
        for budget in self.budgets(group):
            moves |= self._steer(group, budget, step)
        for target in group.held_as(LearnedTarget):
            group.plan(_change(target, moves.get(target.name)))

    def _steer(
        self, group: TargetGroup, budget: Budget, step: int
    ) -> dict[str, Callable[[], None]]:
        wanted = self.wanted(budget, step)
        active = sum(target.active for target in budget.targets)
        moves = self._moves_due(budget, active - budget.keep, step)
        if f"{budget.key}.strength" in group.memory:
            error = math.log(max(active, 1) / wanted)
            updates = self._updates_in_ramp()
            next_strength(self.steering, group.memory, budget.key, error, updates, bool(moves))
        return moves

    def _moves_due(self, budget: Budget, surplus: int, step: int) -> dict[str, Callable[[], None]]:
        """What brings the count to the budget's when the ramp is over and it is too far off."""
        assert self.total_steps is not None
        if step < self._end_of_ramp():
            return {}
        is_last = step >= self.total_steps - 1
        allowed = 0 if self.exact and is_last else budget.tolerance
        return self.moves(budget, surplus) if abs(surplus) > allowed else {}

    def moves(self, budget: Budget, surplus: int) -> dict[str, Callable[[], None]]:
        """What brings the count to the budget's: target name -> change of its gates.

        Args:
            surplus: weights too many; negative for too few.
        """
        chosen = nearest_gates(budget.targets, surplus)
        return {t.name: _put(t, chosen[t.name], keep=surplus < 0) for t in budget.targets}

    def finish(self, group: TargetGroup, step: int) -> None:
        """Make the count exact, should training have gone on since it was."""
        if self.exact and self.total_steps is not None and step >= self.total_steps:
            for budget in self.budgets(group):
                for move in self._steer(group, budget, step).values():
                    move()

    def _end_of_ramp(self) -> int:
        stop = self.update.stop_step(self.total_steps, self.default_stop)
        assert stop is not None  # asked only of policies that are steered
        return stop

    def _updates_in_ramp(self) -> float:
        return max((self._end_of_ramp() - self.update.start) / self.update.every, 1.0)


def _put(target: LearnedTarget, gates: Tensor, *, keep: bool) -> Callable[[], None]:
    return lambda: target.put_across(gates, keep=keep)


def _square(target: LearnedTarget, number: int) -> str:
    """Key of the running mean of a gate's squared gradient."""
    return f"{target.name}.square.{number}"


def _change(target: LearnedTarget, move: Callable[[], None] | None) -> Callable[[], LayerChange]:
    def change() -> LayerChange:
        if move is not None:
            move()
        dropped, grown, active = target.settle()
        return LayerChange(target.name, dropped, grown, active, target.numel)

    return change
