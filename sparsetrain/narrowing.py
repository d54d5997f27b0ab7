"""Parameters that lose slices while they train, and all that is kept for their weights with them.

What is left keeps its values, gradient, optimizer state and mask, and what policies remember of it.
What a policy asks of the smaller weights, it asks from its next update on:

- Static, SET and RigL do not ask again: the active weights that are left stay as many as they are.
- SNFS moves them between layers; all together they stay as many as they are.
- Gradual pruning and surgery go to the counts of the new shapes. Gradual takes nothing back: a
  layer with fewer active weights than that keeps them.
- N:M sparsity chooses among the latent weights at once, because its groups are others now.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from sparsetrain import base_state
from sparsetrain.keeper import Keeper
from sparsetrain.policies import Policy
from sparsetrain.policies.group import TargetGroup
from sparsetrain.recipe import Assignment, Recipe
from sparsetrain.targets import SparseTarget


class Cut(NamedTuple):
    """What is left of a parameter along one dimension.

    Attributes:
        keep: positions along `dim`, int64, ascending, on the parameter's device.
    """

    param: Parameter
    dim: int
    keep: Tensor


def replace_data(parameter: Parameter, data: Tensor) -> None:
    """Give a parameter values of another shape; its gradient goes."""
    parameter.grad = None
    # Autograd's node that collects the gradient remembers the old shape while any graph has it; it
    # is let go when the type of the values changes.
    other = torch.float64 if data.dtype != torch.float64 else torch.float32
    parameter.data = data.new_empty(0, dtype=other)
    parameter.data = data


@torch.no_grad()
def narrow_parameters(cuts: Iterable[Cut], base: Optimizer | None) -> None:
    """Take slices out of parameters, which stay the same objects, and out of an optimizer's state.

    State that only fits the old shape, such as a factored second moment, starts anew.
    """
    total = 0 if base is None else base_state.total_numel(base)
    for cut in cuts:
        shape, gradient = cut.param.shape, cut.param.grad
        replace_data(cut.param, cut.param.data.index_select(cut.dim, cut.keep))
        if gradient is not None:
            cut.param.grad = gradient.index_select(cut.dim, cut.keep)
        if base is not None and cut.param in base.state:
            _narrow_state(base.state[cut.param], shape, cut)
    if base is not None:
        base_state.forget_history(base, total)


def _narrow_state(state: dict[str, Any], shape: torch.Size, cut: Cut) -> None:
    # Without a list of optimizers: what has the parameter's shape is a number for each weight.
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.dim() > 0}
    if any(value.shape != shape for value in tensors.values()):
        state.clear()
        return
    for key, value in tensors.items():
        state[key] = value.index_select(cut.dim, cut.keep.to(value.device))


# With masks


@torch.no_grad()
def check(keeper: Keeper, cuts: Sequence[Cut]) -> None:
    """Refuse cuts that masks or policies cannot follow; nothing changes.

    Raises:
        ValueError: naming the layer and the way out.
    """
    for target in keeper.targets.values():
        if reason := target.why_not_narrowed():
            raise ValueError(
                f"channels cannot be removed while {target.name} is {reason}: finalize() the "
                "optimizer first"
            )
    follow = _follower(keeper, cuts)
    for policy, group in keeper.groups:
        smaller = {t.name: _smaller(t, cuts) for t in _narrowed(group, cuts)}
        if not smaller:
            continue
        rehearsal = replace(group, targets=[smaller.get(t.name, t) for t in group.targets])
        try:
            follow(policy).after_narrowing(rehearsal, list(smaller.values()))
        except ValueError as error:
            raise ValueError(
                f"the masks cannot follow when these channels are removed: {error}; keep the "
                "channels, or finalize() the optimizer first"
            ) from error


@torch.no_grad()
def narrow(keeper: Keeper, cuts: Sequence[Cut]) -> None:
    """Take slices out of parameters and all that is kept for them.

    Raises:
        ValueError: as `check`; nothing has changed.
    """
    check(keeper, cuts)
    follow = _follower(keeper, cuts)
    narrow_parameters(cuts, keeper.base)
    keeper.recipe = _narrowed_recipe(keeper.recipe, follow)
    keeper.waiting = [Assignment(follow(a.policy), a.candidates) for a in keeper.waiting]
    keeper.groups = [(follow(policy), group) for policy, group in keeper.groups]
    for policy, group in keeper.groups:
        targets = _narrowed(group, cuts)
        for target in targets:
            for cut in _of(target, cuts):
                _narrow_memory(group, target, cut)
                keeper.tracker.narrow(target, cut.dim, cut.keep)
                target.take(cut.dim, cut.keep)
            target.mask_weight()
        if targets:
            policy.after_narrowing(group, targets)
    if keeper.tracker.explored is not None:
        keeper.tracker.explore(keeper.targets.values())


def _of(target: SparseTarget, cuts: Iterable[Cut]) -> list[Cut]:
    return [cut for cut in cuts if cut.param is target.param]


def _narrowed(group: TargetGroup, cuts: Iterable[Cut]) -> list[SparseTarget]:
    return [target for target in group.targets if _of(target, cuts)]


def _smaller(target: SparseTarget, cuts: Iterable[Cut]) -> SparseTarget:
    """A target as it will be, which shares nothing with the one that it is."""
    smaller = copy.copy(target)
    for cut in _of(target, cuts):
        left = smaller.param.detach().index_select(cut.dim, cut.keep)
        smaller.param = Parameter(left, requires_grad=False)
        smaller.take(cut.dim, cut.keep)
    return smaller


def _narrow_memory(group: TargetGroup, target: SparseTarget, cut: Cut) -> None:
    """Slices out of what a policy remembers of each weight of a target: `name` and `name.*`."""
    for key, value in group.memory.items():
        is_its_own = key == target.name or key.startswith(f"{target.name}.")
        if is_its_own and isinstance(value, Tensor) and value.shape == target.shape:
            group.memory[key] = value.index_select(cut.dim, cut.keep.to(value.device))


def _follower(keeper: Keeper, cuts: Sequence[Cut]) -> Callable[[Policy], Policy]:
    """What makes of a policy the one for the smaller weights."""
    names = {id(target.param): name for name, target in keeper.targets.items()}
    names |= {id(c.param): c.name for a in keeper.waiting for c in a.candidates}
    named = [(names[id(cut.param)], cut) for cut in cuts if id(cut.param) in names]

    def follow(policy: Policy) -> Policy:
        for name, cut in named:
            policy = policy.narrowed(name, cut.dim, cut.keep)
        return policy

    return follow


def _narrowed_recipe(recipe: Recipe, follow: Callable[[Policy], Policy]) -> Recipe:
    rules = tuple(
        rule.model_copy(update={"policy": follow(rule.policy)}) if rule.policy else rule
        for rule in recipe.rules
    )
    policy = follow(recipe.policy) if recipe.policy else None
    return recipe.model_copy(update={"policy": policy, "rules": rules})
