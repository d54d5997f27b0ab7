"""Holding the weights of one optimizer, and changing from one way of holding to another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from sparsetrain import base_state, checkpoint
from sparsetrain.base_state import RestingStates
from sparsetrain.distributed.following import Places, take_over
from sparsetrain.distributed.sharded_modules import Move, hand_over
from sparsetrain.part import part_of
from sparsetrain.policies import LearnedPolicy, Policy
from sparsetrain.policies.group import TargetGroup
from sparsetrain.storage.csr.target import CsrTarget
from sparsetrain.storage.learned import LearnedTarget
from sparsetrain.storage.masked import MaskedTarget
from sparsetrain.storage_choice import Storage, StorageChoice
from sparsetrain.switching import to_csr, to_masked
from sparsetrain.targets import Exchanged, ExchangeTarget, SparseTarget

Groups = list[tuple[Policy, TargetGroup]]


class Holder:
    """Every weight's storage, and the optimizer's state that goes with it.

    Attributes:
        choice: decides how each weight is held.
        targets: name -> target, in the order of their groups.
        resting: how the base optimizer treats weights that rest.
    """

    def __init__(self, base: Optimizer, model: nn.Module, storage: Storage) -> None:
        self.base = base
        self.model = model
        self.choice = StorageChoice(model, storage)
        self.targets: dict[str, SparseTarget] = {}
        self.resting = RestingStates(base)

    def carry_state(self, target: ExchangeTarget, change: Callable[[], Exchanged]) -> Exchanged:
        """Exchange connections, the optimizer's state with them."""
        fresh = self.resting.of(target.param).fresh
        return base_state.carry_state(self.base, target, change, fresh)

    def attach(self, groups: Groups) -> None:
        """Put learned masks into the model and their gates into the optimizer, all or none."""
        known = len(self.base.param_groups)
        attached: list[LearnedTarget] = []
        try:
            for policy, group in groups:
                targets = group.held_as(LearnedTarget)
                for target in targets:
                    target.attach()
                    attached.append(target)
                if isinstance(policy, LearnedPolicy) and targets:
                    self._train_gates(policy, group, targets)
        except Exception:
            del self.base.param_groups[known:]
            for target in reversed(attached):
                target.detach()
            raise
        self.resting.look_again()

    def _train_gates(
        self, policy: LearnedPolicy, group: TargetGroup, targets: list[LearnedTarget]
    ) -> None:
        of_weights = base_state.group_of(self.base, targets[0].param)
        gates = [gate for target in targets for gate in target.learned.gates()]
        options = base_state.options_like(of_weights, policy.group_options(of_weights))
        base_state.add_group(self.base, gates, options, policy.kind)
        if policy.moves_in_log_odds:
            options = self.base.param_groups[-1]
            group.memory["normalises"] = not base_state.is_scale_free(self.base, options, gates[0])

    def settle(self, groups: Groups) -> None:
        """Hold weights by their non-zeros where that is wanted now."""
        for policy, group, number, target in _each(groups):
            if not isinstance(target, MaskedTarget) or not self.choice.wants_csr(policy, target):
                continue
            if reason := base_state.why_not_resized(self.base, target.param):
                self.choice.forbid(target, reason)
                continue
            held = to_csr(self.base, target, self.choice.owner_of(target))
            self._install(group, number, held)
        self.choice.follow_layout(self.targets.values())

    def follow_layers(self) -> None:
        """Train the values that sparse layers hold now; loading a state dict may replace them."""
        for target in self.targets.values():
            if isinstance(target, CsrTarget) and target.layer.values is not target.param:
                old, target.param = target.param, target.layer.values
                self.base.state.pop(old, None)
                base_state.replace_parameter(self.base, old, target.param, lambda key, held: held)
                self.resting.look_again()

    def can_switch(self, groups: Groups, name: str) -> bool:
        """Whether a checkpoint may decide how a weight is held."""
        return any(
            target.name == name and self.choice.can_switch(policy, target)
            for policy, _, _, target in _each(groups)
        )

    @torch.no_grad()
    def match(self, groups: Groups, saved: Mapping[str, Any]) -> None:
        """Hold each weight as the entries of a checkpoint do, which are known to fit."""
        self.follow_layers()
        for _, group, number, target in _each(groups):
            entry = saved[target.name]
            is_csr = checkpoint.storage_of(entry) == "csr"
            if isinstance(target, CsrTarget) and is_csr:
                self.carry_state(target, partial(target.take_pattern, entry))
                self.resting.look_again()
            elif isinstance(target, CsrTarget):
                self._install(group, number, self._masked(target))
            elif is_csr and isinstance(target, MaskedTarget):
                target.replace_mask(checkpoint.mask_of(entry, target))
                held = to_csr(self.base, target, self.choice.owner_of(target))
                self._install(group, number, held)
        self.choice.follow_layout(self.targets.values())

    @torch.no_grad()
    def release(self, groups: Groups, *, dense: bool) -> None:
        """Leave the weights in the model, densely unless they were built sparse, and nothing else.

        Args:
            dense: False leaves every weight as it is held.
        """
        self.choice.release()
        moves: list[Move] = []
        dropped: list[nn.Module] = []
        for _, group, number, target in _each(groups):
            if dense and isinstance(target, CsrTarget) and not target.built:
                self._install(group, number, self._masked(target))
            if isinstance(target, LearnedTarget) and not target.part.is_whole:
                moves += target.moves()
                dropped.append(target.learned)
            group.targets[number].release()
            if isinstance(target, LearnedTarget):
                base_state.drop_parameters(self.base, target.learned.gates())
        if moves:
            hand_over(self.model, moves, dropped)

    def locate(self) -> None:
        """Remember where the model has the parameters that the optimizer trains."""
        self.places = Places(self.model, self.base)

    @torch.no_grad()
    def follow_shards(self, groups: Groups) -> None:
        """Go on with parameters that `fully_shard` has put in the place of those that were here."""
        replaced = self.places.replaced()
        if not replaced:
            return
        by_id = {id(old): new for old, new in replaced}
        for old, new in replaced:
            take_over(self.base, old, new)
        for _, group, _, target in _each(groups):
            place = by_id.get(id(target.param))
            if place is not None:
                self._shard_memory(group, target, place)
                target.follow(place)
        self.resting.look_again()

    def _shard_memory(self, group: TargetGroup, target: SparseTarget, new: Parameter) -> None:
        """What a policy remembers of each weight of a target, by its name: what of it is here."""
        part = part_of(target.name, new)
        for key, value in group.memory.items():
            is_its_own = key == target.name or key.startswith(f"{target.name}.")
            if is_its_own and isinstance(value, Tensor) and tuple(value.shape) == target.shape:
                group.memory[key] = part.wrap(part.held(value).clone())

    def _masked(self, target: CsrTarget) -> SparseTarget:
        return to_masked(self.base, target, self.resting.of(target.param).fresh)

    def _install(self, group: TargetGroup, number: int, target: SparseTarget) -> None:
        group.targets[number] = self.targets[target.name] = target
        self.resting.look_again()


def _each(groups: Groups) -> Iterator[tuple[Policy, TargetGroup, int, SparseTarget]]:
    """Every target with its policy, its group and its place there, which may be written to."""
    for policy, group in groups:
        for number, target in enumerate(group.targets):
            yield policy, group, number, target
