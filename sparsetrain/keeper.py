"""The keeper: owns everything that changes while masks are held, and acts around each step."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparsetrain import base_state, checkpoint
from sparsetrain.holding import Holder
from sparsetrain.policies import Policy
from sparsetrain.policies.group import TargetGroup
from sparsetrain.recipe import Assignment, Recipe
from sparsetrain.report.events import LayerChange, UpdateEvent
from sparsetrain.storage.latent import LatentTarget
from sparsetrain.targets import SparseTarget
from sparsetrain.tracking import Tracker
from sparsetrain.wiring import check_built, copy_to_device_of, held_by

Listener = Callable[[UpdateEvent], None]


class Keeper:
    """Targets, masks, clock, generator and policy memory of one `SparseOptimizer`."""

    def __init__(self, base: Optimizer, recipe: Recipe, seed: int, holder: Holder) -> None:
        self.base = base
        self.recipe = recipe
        self.holder = holder
        self.step_count = 0
        self.groups: list[tuple[Policy, TargetGroup]] = []
        self.waiting: list[Assignment] = []
        self.generator = torch.Generator().manual_seed(seed)
        self.tracker = Tracker()
        self.listeners: OrderedDict[int, Listener] = OrderedDict()
        self.released = False

    def __getstate__(self) -> dict[str, Any]:
        groups = [(policy, group.targets, group.memory) for policy, group in self.groups]
        return self.__dict__ | {
            "generator": self.generator.get_state(),
            "groups": groups,
            "listeners": OrderedDict(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.generator = torch.Generator()
        self.generator.set_state(state["generator"])
        self.groups = [(p, self._new_group(targets, mem)) for p, targets, mem in state["groups"]]

    @property
    def targets(self) -> dict[str, SparseTarget]:
        """Name -> target, in the order of the groups."""
        return self.holder.targets

    # Taking tensors into care.

    @torch.no_grad()
    def adopt(self, assignments: list[Assignment]) -> None:
        """Make targets of the tensors that the base optimizer holds; the others wait.

        Every decision comes before every change, so that an error changes nothing.
        """
        held, waiting = held_by(self.base, assignments)
        before = self.generator.get_state()
        try:
            planned = [self._plan(assignment) for assignment in held]
        except Exception:
            self.generator.set_state(before)
            raise
        self.holder.attach([(policy, group) for policy, group, _ in planned])
        self.waiting = waiting
        for policy, group, masks in planned:
            self.groups.append((policy, group))
            for target in group.targets:
                self.targets[target.name] = target
                if target.name in masks and not target.built:
                    target.begin(masks[target.name])
                self._zero_inactive_state(target)
                self.holder.choice.begin(policy, target)
        self.holder.settle(self.groups)
        self.holder.locate()
        self._announce_step()

    def follow_shards(self) -> None:
        """Go on with parameters that `fully_shard` has put in the place of the optimizer's."""
        self.holder.follow_shards(self.groups)

    def adopt_waiting(self) -> None:
        """Look again at tensors that the base optimizer did not hold before."""
        self.holder.resting.look_again()
        self.adopt(self.waiting)

    def _plan(self, assignment: Assignment) -> tuple[Policy, TargetGroup, dict[str, Tensor]]:
        policy = assignment.policy
        targets = [
            self.holder.choice.target_of(policy, c, self.generator) for c in assignment.candidates
        ]
        group = self._new_group(targets, {})
        check_built(policy, group)
        return policy, group, policy.initial_masks(group)

    def _new_group(self, targets: list[SparseTarget], memory: dict[str, Any]) -> TargetGroup:
        return TargetGroup(
            targets=targets,
            generator=self.generator,
            state_of=lambda param: self.base.state.get(param, {}),
            carry_state=self.holder.carry_state,
            memory=memory,
        )

    # Around a step.

    def replaces_step(self) -> bool:
        """Whether masks change in place of the gradient step now."""
        return any(p.replaces_step and p.update_is_due(self.step_count) for p, _ in self.groups)

    @torch.no_grad()
    def prepare(self) -> None:
        """Before the base optimizer steps: gradients of inactive weights go."""
        self.holder.follow_layers()
        self._observe()
        for target in self.targets.values():
            target.before_step()

    def conceal(self) -> None:
        """Latent weights go back behind the masked ones."""
        with torch.no_grad():
            for target in self.targets.values():
                target.conceal()

    def show_masked(self) -> None:
        """Before a forward pass inside a step: masked weights, whatever was written to them."""
        self.conceal()
        with torch.no_grad():
            for target in self.targets.values():
                target.check_outside_writes()

    def guard(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure with masked weights before it and masked gradients after it."""

        def guarded() -> Any:
            self.show_masked()
            loss = closure()
            self.prepare()
            return loss

        return guarded

    @torch.no_grad()
    def after_step(self) -> None:
        """After the base optimizer stepped: exact zeros, then mask updates that are due."""
        for target in self.targets.values():
            keeps_zeros = not target.holds_zeros or self.holder.resting.of(target.param).keeps_zeros
            target.after_step(keeps_zeros)
            if not keeps_zeros:
                self._zero_inactive_state(target)
        self._count_step()
        changes = None
        try:
            if any(self._is_due(policy) for policy, _ in self.groups):
                changes = self._commit(self._decide(self._is_due))
        finally:  # the base optimizer has stepped, so the clock moves whatever the masks do
            self.step_count += 1
        if changes is not None or self.holder.choice.is_waiting:
            self.holder.settle(self.groups)
        if changes is not None:  # before the next step's thresholds and temperatures are set
            self._tell(self.step_count - 1, changes)
        self._announce_step()

    @torch.no_grad()
    def update_instead(self) -> None:
        """The step on which masks change in place of the gradient step."""
        self.holder.follow_layers()
        self._observe()
        for target in self.targets.values():
            target.check_outside_writes()
        decided = self._decide(self._is_due)
        self._count_step()
        changes = self._commit(decided)
        self.step_count += 1
        self.holder.settle(self.groups)
        self._tell(self.step_count - 1, changes)
        self._announce_step()

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Zero gradients of inactive weights, but for those that this step needs dense."""
        for policy, group in self.groups:
            if not policy.needs_dense_gradient(self.step_count):
                for target in group.targets:
                    target.mask_gradient()

    @torch.no_grad()
    def update(self) -> None:
        """Let all policies change their masks now, and tell the listeners."""
        self.holder.follow_layers()
        for target in self.targets.values():
            target.check_outside_writes()
        self._tell(self.step_count, self._commit(self._decide(lambda policy: True)))

    def _is_due(self, policy: Policy) -> bool:
        return policy.update_is_due(self.step_count)

    def _decide(self, chosen: Callable[[Policy], bool]) -> list[TargetGroup]:
        """Let the chosen policies plan their changes; an error leaves everything as it was."""
        updating = [(policy, group) for policy, group in self.groups if chosen(policy)]
        random_state = self.generator.get_state()
        memories = [dict(group.memory) for _, group in updating]
        try:
            for policy, group in updating:
                policy.update_masks(group, self.step_count)
        except Exception:
            self.generator.set_state(random_state)
            for (_, group), memory in zip(updating, memories, strict=True):
                group.discard()
                group.memory.clear()
                group.memory.update(memory)
            raise
        return [group for _, group in updating]

    def _commit(self, decided: list[TargetGroup]) -> list[LayerChange]:
        """Make the planned changes."""
        numel = base_state.total_numel(self.base)
        changes = [change for group in decided for change in group.commit()]
        if any(change.dropped or change.grown for change in changes):
            base_state.forget_history(self.base, numel)
        if self.tracker.explored is not None:
            self.tracker.explore(self.targets.values())
        return changes

    def _tell(self, step: int, changes: list[LayerChange]) -> None:
        # What counts over ranks is asked of all of them, whichever listen.
        if not self.listeners and all(target.part.is_whole for target in self.targets.values()):
            return
        total = sum(target.part.held_numel for target in self.targets.values())
        rate = self.tracker.exploration_rate(total)
        event = UpdateEvent(step, self.sparsity(), rate, tuple(changes))
        for listener in list(self.listeners.values()):
            listener(event)

    def _observe(self) -> None:
        for policy, group in self.groups:
            for target in group.targets:
                target.check_gradient()
            policy.observe(group, self.step_count)

    def _count_step(self) -> None:
        for policy, group in self.groups:
            dense = policy.needs_dense_gradient(self.step_count)
            self.tracker.count_step(group.targets, dense)

    def sparsity(self) -> float:
        """Share of zeros over all targets together, in [0, 1]."""
        targets: Iterable[SparseTarget] = self.targets.values()
        return 1.0 - sum(t.active for t in targets) / sum(t.numel for t in targets)

    @torch.no_grad()
    def penalty(self) -> Tensor:
        """Sum of what the policies add to the loss."""
        found = [policy.penalty(group, self.step_count) for policy, group in self.groups]
        return sum((part for part in found if part is not None), torch.zeros(()))

    @torch.no_grad()
    def release(self, *, dense: bool) -> None:
        """Leave the masked weights in the model and forget everything else."""
        for policy, group in self.groups:
            policy.finish(group, self.step_count)
        self.holder.release(self.groups, dense=dense)
        for _, group in self.groups:
            group.memory.clear()
        self.released = True

    def _announce_step(self) -> None:
        """Get policies and storages ready for the forward and backward passes of the next step."""
        with torch.no_grad():
            for policy, group in self.groups:
                policy.follow_clock(group, self.step_count)
        self.watch_gradients()

    def watch_gradients(self, *, always: bool = False) -> None:
        """Tell the storages whether the next step needs the gradients of inactive weights."""
        for policy, group in self.groups:
            needed = policy.needs_dense_gradient(self.step_count)
            needed |= always and policy.dense_gradient != "never"
            for target in group.targets:
                target.watch_gradient(needed)

    def _zero_inactive_state(self, target: SparseTarget) -> None:
        if target.holds_zeros and not isinstance(target, LatentTarget):
            base_state.zero_inactive_state(self.base, target)

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, numbers and strings."""
        return {
            "version": checkpoint.VERSION,
            "recipe": json.dumps(self.recipe.to_dict()),
            "step_count": self.step_count,
            "generator": self.generator.get_state(),
            "targets": {n: checkpoint.describe_target(t) for n, t in self.targets.items()},
            "memories": [dict(group.memory) for _, group in self.groups],
            "tracker": self.tracker.state_dict(),
            "measured": self.holder.choice.measured(),
        }

    def remembered(self) -> list[dict[str, Tensor]]:
        """For each group what its policy may keep of each weight, as it begins."""
        return [policy.remembers(group) for policy, group in self.groups]

    def can_switch(self, name: str) -> bool:
        """Whether a checkpoint may decide how a weight is held."""
        return self.holder.can_switch(self.groups, name)

    def match_storage(self, saved: dict[str, Any]) -> None:
        """Hold each weight as a checkpoint does that `checkpoint.check` has accepted."""
        self.holder.match(self.groups, saved["targets"])

    @torch.no_grad()
    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Inverse of `state_dict`, for a state that `checkpoint.check` has accepted."""
        self.step_count = int(saved["step_count"])
        self.generator.set_state(saved["generator"].cpu())
        for name, entry in saved["targets"].items():
            self.targets[name].restore_entry(entry)
        for (_, group), memory in zip(self.groups, saved["memories"], strict=True):
            group.memory.clear()
            group.memory.update({k: copy_to_device_of(v, group) for k, v in memory.items()})
        self.tracker.load_state_dict(saved["tracker"])
        self.holder.choice.remember(saved.get("measured", {}))
        self._announce_step()
