"""What holds at both ends of a run: when an optimizer is wrapped, and when it is let go."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from sparsetrain.batches import called
from sparsetrain.candidates import find_candidates
from sparsetrain.evaluating import evaluation_mode
from sparsetrain.policies import NMSparse
from sparsetrain.recipe import Recipe, Rule
from sparsetrain.storage.learned import LearnedTarget
from sparsetrain.testing.broken import BrokenInvariant, require
from sparsetrain.testing.case import (
    Case,
    Run,
    policies_of,
    require_same,
    step_plainly,
    tensors_of,
)
from sparsetrain.testing.trees import first_difference, frozen

#: Learned masks compute in another order once they are baked in, csr storage too.
_ROUNDING = {"learned": 1e-5, "csr": 1e-4}


def recipes_round_trip(case: Case) -> str | None:
    """A policy comes back as it was from a dict, from JSON and from YAML, by its `kind`."""
    recipe = case.recipe
    ways: dict[str, Callable[[], Recipe]] = {
        "a dict": lambda: Recipe.from_dict(recipe.to_dict()),
        "JSON": lambda: Recipe.from_text(recipe.to_json()),
        "YAML": lambda: Recipe.from_text(recipe.to_yaml()),
    }
    for way, there_and_back in ways.items():
        try:
            again = there_and_back()
        except ValueError as error:
            raise BrokenInvariant(f"{way} with it in is refused: {error}") from error
        for mine, other in zip(policies_of(recipe), policies_of(again), strict=True):
            says = (
                f"kind {mine.kind!r} is {type(other).__name__} when it comes back from {way}, not "
                f"{type(mine).__name__}: give each policy a kind of its own"
            )
            require(type(mine) is type(other), says)
        different = first_difference(recipe.to_dict(), again.to_dict())
        require(different is None, f"{different} is another when it comes back from {way}")
        require(again == recipe, f"it is not equal to what comes back from {way}")
    return None


def refused_wraps_change_nothing(case: Case) -> str | None:
    """When wrapping fails, model, optimizer and policy are as they were; wrapping again works.

    It is made to fail after the policy has chosen its masks: by a rule that gives the last weight a
    policy which does not fit.
    """
    model = case.new_model().train()
    base = case.new_optimizer(model.parameters())
    bad = _refused(case, model, base)
    if bad is None:
        return "it holds all weights there are, so that no other policy can be refused"
    before = _state_of(model, base)
    try:
        _wrap_as(case, base, model, bad)
    except ValueError:
        pass
    else:
        raise BrokenInvariant("a policy that does not fit was accepted")
    different = first_difference(before, _state_of(model, base))
    require(different is None, f"a refused wrap changed {different}")
    wrapped = Run(case, model, case.wrap(base, model))
    require_same(case.start().mark(), wrapped.mark(), "wrapping after a refusal differs")
    return None


def _refused(case: Case, model: nn.Module, base: Optimizer) -> Recipe | None:
    """The recipe with a rule that cannot be followed; None when there is no weight left for it."""
    held = {id(p) for group in base.param_groups for p in group["params"]}
    weights = [c for c in find_candidates(model) if c.is_default and id(c.param) in held]
    targets = set(case.start().optimizer.targets)
    if not weights or not targets - {weights[-1].name}:
        return None
    last = weights[-1]
    misfit = NMSparse(n=1, m=last.param.shape[1] + 1)
    rule = Rule(regex=f"^{re.escape(last.name)}$", policy=misfit)
    return case.recipe.model_copy(update={"rules": (rule, *case.recipe.rules)})


def _wrap_as(case: Case, base: Optimizer, model: nn.Module, recipe: Recipe) -> None:
    Case(**{**vars(case), "recipe": recipe}).wrap(base, model)


def _state_of(model: nn.Module, base: Optimizer) -> dict[str, Any]:
    """All that wrapping could change, as plain values and copies."""
    return {
        "the model's values": frozen(tensors_of(model)),
        "the gradients": [parameter.grad is None for parameter in model.parameters()],
        "the modules": _modules(model),
        "the optimizer's groups": [
            {**group, "params": [id(parameter) for parameter in group["params"]]}
            for group in base.param_groups
        ],
        "the optimizer's state": len(base.state),
        "the optimizer's hooks": _hooks_of(base),
    }


def _modules(model: nn.Module) -> list[tuple[str, str, int]]:
    """Names, classes and numbers of hooks."""
    return [
        (name, type(m).__qualname__, len(m._forward_hooks) + len(m._forward_pre_hooks))
        for name, m in model.named_modules()
    ]


def _hooks_of(base: Optimizer) -> int:
    hooks: Any = (base._optimizer_step_pre_hooks, base._optimizer_step_post_hooks)
    return sum(map(len, hooks))


def state_dict_names_stay(case: Case) -> str | None:
    """In training, too, the model's state dict has the names of a plain model, and its modules."""
    run = case.start()
    if any(isinstance(target, LearnedTarget) for _, target in run.held):
        return "learned masks are parametrizations until finalize()"
    if case.storage != "masked":
        return "its storage has names of its own until finalize()"
    _require_plain(run, None)
    for step in run.steps(0, 1):
        _require_plain(run, step)
    return None


def _require_plain(run: Run, step: int | None) -> None:
    plain = run.case.new_model()
    missing = plain.state_dict().keys() - run.model.state_dict().keys()
    extra = run.model.state_dict().keys() - plain.state_dict().keys()
    for name in sorted(missing | extra):
        says = f"the state dict {'lacks' if name in missing else 'has'} {name!r}"
        require(False, f"{says}, unlike a plain model's", step=step)
    # torch puts a weight last when it takes a parametrization away.
    if not any(isinstance(target, LearnedTarget) for _, target in run.held):
        same = list(plain.state_dict()) == list(run.model.state_dict())
        require(same, "the state dict has the names of a plain model in another order", step=step)
    modules = first_difference(_modules(plain), _modules(run.model))
    require(modules is None, f"modules or their hooks have changed: {modules}", step=step)


def finalize_leaves_a_plain_model(case: Case) -> str | None:
    """`finalize()` leaves exact zeros, the outputs of evaluation, and no trace of anything else.

    Plain modules, plain names, an optimizer that steps on with the model's own parameters. After
    the first step and after the last.
    """
    for stop in sorted({1, case.steps}):
        run = case.start()
        run.advance(0, stop)
        at = stop - 1
        before, masks = _outputs(run), run.optimizer.masks()
        run.optimizer.finalize()
        _require_plain(run, at)
        _require_outputs(run, before, at)
        _require_baked(run, masks, at)
        _require_plain_optimizer(run, at)
        run.backward(stop)
        step_plainly(run.optimizer.base, partial(run.backward, stop))
    return None


@torch.no_grad()
def _outputs(run: Run) -> list[Tensor]:
    with evaluation_mode(run.model):
        outputs = called(run.model, run.case.batch_for(run.model, 0)[0])
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _require_outputs(run: Run, before: list[Tensor], step: int) -> None:
    storages = {target.storage for _, target in run.held} | {run.case.storage}
    rounding = max((_ROUNDING.get(storage, 0.0) for storage in storages), default=0.0)
    for was, now in zip(before, _outputs(run), strict=True):
        alike = torch.allclose(was, now, rtol=rounding, atol=rounding, equal_nan=True)
        require(alike, "finalize() changed what the model answers in evaluation", step=step)


def _require_baked(run: Run, masks: dict[str, Tensor], step: int) -> None:
    for name, mask in masks.items():
        weight = run.model.get_parameter(name).detach()
        wrong = int(weight[~mask].count_nonzero())
        says = f"{wrong} weights outside the mask are not 0 after finalize()"
        require(wrong == 0, says, step=step, layer=name)
        same = torch.equal(run.optimizer.masks()[name], mask)
        require(bool(same), "finalize() changed the mask", step=step, layer=name)


def _require_plain_optimizer(run: Run, step: int) -> None:
    base = run.optimizer.base
    require(_hooks_of(base) == 0, "hooks are left on the optimizer", step=step)
    mine = {id(parameter): name for name, parameter in run.model.named_parameters()}
    held = [id(parameter) for group in base.param_groups for parameter in group["params"]]
    require(set(held) <= set(mine), "the optimizer trains what is not the model's", step=step)
    require({id(p) for p in base.state} <= set(mine), "stale optimizer state is left", step=step)
    plain = run.case.new_optimizer(run.case.new_model().parameters())
    names = [len(group["params"]) for group in plain.param_groups]
    now = [len(group["params"]) for group in base.param_groups]
    require(names == now, f"parameter groups have {now} tensors, not {names}", step=step)
