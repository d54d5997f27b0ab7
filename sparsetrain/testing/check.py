"""check_policy and check_model: run the invariants, and tell what held."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from sparsetrain.config import did_you_mean
from sparsetrain.policies import DynamicPolicy, LearnedPolicy, Policy
from sparsetrain.recipe import Recipe
from sparsetrain.testing.broken import BrokenInvariant
from sparsetrain.testing.case import (
    BatchOf,
    Case,
    Loss,
    Mark,
    mark_of,
    policies_of,
    require_alike,
    step_plainly,
)
from sparsetrain.testing.invariants import INVARIANTS, Invariant
from sparsetrain.testing.problem import OPTIMIZERS, STEPS, MakeOptimizer, SmallNet, batch
from sparsetrain.testing.report import Outcome, Report

#: Names of `OPTIMIZERS`, a function of a model's parameters, or names with such functions.
Optimizers = str | Sequence[str] | MakeOptimizer | Mapping[str, MakeOptimizer]
#: What `SparseOptimizer` takes for a policy.
AnyPolicy = Policy | Recipe | Mapping[str, Any] | str | Path

_LONGEST = 200
_PLAIN_STEPS = 3
_SHORTER = "give one of few steps, say total_steps=14 and update={'every': 3}"


def check_policy(
    policy: AnyPolicy,
    *,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    batches: BatchOf | Iterable[Any] | None = None,
    loss: Loss = F.cross_entropy,
    optimizer: Optimizers | None = None,
    steps: int | None = None,
    seed: int = 0,
    storage: str = "masked",
    only: Iterable[str] | None = None,
    skip: Iterable[str] = (),
    invariants: Sequence[Invariant] = INVARIANTS,
) -> Report:
    """Train a policy for a few steps again and again, and see whether it keeps to every invariant.

    Args:
        policy: the policy, or a recipe with it. It has to be one for few steps; the runs are as
            long as it says.
        model: a network, which is copied for each run, or a function that makes one. By default a
            small one with a convolution, a batch norm and two linear layers.
        batches: for `model`: a function of the number of a step that gives (inputs, targets), or
            an iterable of them, which is read once and used in turn.
        loss: (outputs, targets) -> scalar.
        optimizer: which optimizers to wrap. By default "sgd", "momentum" and "adamw"; "adamw" for
            learned masks, whose gates are trained so in their papers.
        steps: of each run; by default the policy's `total_steps`, or 14.
        seed: of policy and default model.
        storage: as for `SparseOptimizer`.
        only: names of the invariants to check.
        skip: names of those not to check.
        invariants: all there are to choose from; add your own to `INVARIANTS`.

    Returns:
        What was checked, and what said nothing about this policy.

    Raises:
        BrokenInvariant: an AssertionError that says which invariant does not hold, with which
            optimizer, at which step and in which layer.
        ValueError: the arguments do not fit together; or the policy makes no update in so few
            steps, or takes too many.
    """
    recipe = Recipe.coerce(policy)
    chosen = _chosen(invariants, only, skip)
    length = _length(recipe, steps)
    new_model, batch_of = _problem(model, batches, length, seed)
    makers, outcomes = _optimizers(optimizer, recipe), []
    with torch.random.fork_rng(devices=_devices(new_model())):
        for name, make in makers.items():
            case = Case(recipe, new_model, make, batch_of, loss, length, name, seed, storage)
            if model is not None:
                _require_repeatable(case)
            outcomes += [_outcome(invariant, case) for invariant in chosen]
    kinds = dict.fromkeys(found.kind for found in policies_of(recipe))
    subject = f"{', '.join(kinds)} over {length} steps with {', '.join(makers)}"
    return Report(subject, tuple(outcomes))


def check_model(
    model: nn.Module | Callable[[], nn.Module],
    policy: AnyPolicy,
    batches: BatchOf | Iterable[Any],
    loss: Loss = F.cross_entropy,
    **options: Any,
) -> Report:
    """`check_policy` for a model of your own: whether it trains sparse as it should.

    Args:
        model: as for `check_policy`; a module is left as it is.
        options: the other arguments of `check_policy`.
    """
    return check_policy(policy, model=model, batches=batches, loss=loss, **options)


def _outcome(invariant: Invariant, case: Case) -> Outcome:
    name = invariant.__name__
    try:
        left_out = invariant(case)
    except BrokenInvariant as broken:
        broken.invariant, broken.optimizer = name, case.optimizer
        raise
    except Exception as error:
        error.add_note(f"while {name} was checked with optimizer {case.optimizer!r}")
        raise
    return Outcome(name, case.optimizer, left_out)


def _chosen(
    invariants: Sequence[Invariant], only: Iterable[str] | None, skip: Iterable[str]
) -> list[Invariant]:
    known = {invariant.__name__: invariant for invariant in invariants}
    wanted, unwanted = None if only is None else _names(only), _names(skip)
    for name in [*(wanted or []), *unwanted]:
        if name not in known:
            raise ValueError(
                f"there is no invariant {name!r}{did_you_mean(name, known)}; there are: "
                f"{', '.join(known)}"
            )
    chosen = [known[n] for n in known if (wanted is None or n in wanted) and n not in unwanted]
    if not chosen:
        raise ValueError("'only' and 'skip' leave no invariant to check")
    return chosen


def _names(names: Iterable[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _length(recipe: Recipe, steps: int | None) -> int:
    policies = policies_of(recipe)
    if steps is None:
        steps = max((getattr(p, "total_steps", None) or 0 for p in policies), default=0) or STEPS
        if steps > _LONGEST:
            raise ValueError(
                f"the policy is for {steps} steps, and every invariant trains as long: {_SHORTER}, "
                "or say how many with steps="
            )
    if steps < 2:
        raise ValueError(f"steps={steps}: a run needs two steps at least")
    for policy in policies:
        updates = any(policy.update_is_due(step) for step in range(steps))
        if isinstance(policy, DynamicPolicy | LearnedPolicy) and not updates:
            raise ValueError(
                f"policy {policy.kind!r} makes no update in {steps} steps, so there would be "
                f"little to see: {_SHORTER}"
            )
    return steps


def _problem(
    model: nn.Module | Callable[[], nn.Module] | None,
    batches: BatchOf | Iterable[Any] | None,
    steps: int,
    seed: int,
) -> tuple[Callable[[], nn.Module], BatchOf]:
    if (model is None) != (batches is None):
        raise ValueError("'model' and 'batches' go together: give both or none")
    if model is None or batches is None:
        return lambda: SmallNet(seed), batch
    new_model = (lambda: copy.deepcopy(model)) if isinstance(model, nn.Module) else model
    if callable(batches):
        return new_model, batches
    read = list(itertools.islice(batches, steps))
    if not read or not all(isinstance(item, list | tuple) and len(item) == 2 for item in read):
        raise ValueError(
            "'batches' has to yield (inputs, targets), or to be a function of the number of a step "
            "that returns them"
        )
    return new_model, lambda step: tuple(read[step % len(read)])


def _optimizers(wanted: Optimizers | None, recipe: Recipe) -> dict[str, MakeOptimizer]:
    if wanted is None:
        learned = any(isinstance(policy, LearnedPolicy) for policy in policies_of(recipe))
        wanted = ["adamw"] if learned else ["sgd", "momentum", "adamw"]
    if isinstance(wanted, Mapping):
        return dict(wanted)
    if callable(wanted):
        return {getattr(wanted, "__name__", "yours"): wanted}
    found = {}
    for name in _names(wanted):
        if name not in OPTIMIZERS:
            raise ValueError(
                f"there is no optimizer {name!r}{did_you_mean(name, OPTIMIZERS)}: give one of "
                f"{', '.join(OPTIMIZERS)}, or a function of the model's parameters"
            )
        found[name] = OPTIMIZERS[name]
    return found


def _devices(model: nn.Module) -> list[torch.device]:
    """CUDA devices whose random numbers a run draws from."""
    found = dict.fromkeys(parameter.device for parameter in model.parameters())
    return [device for device in found if device.type == "cuda"]


def _require_repeatable(case: Case) -> None:
    """Raise ValueError for a model that trains differently each time even without a policy."""
    first, second = _without_policy(case), _without_policy(case)
    try:
        require_alike(first, second, "")
    except BrokenInvariant as broken:
        raise ValueError(
            f"without any policy, two trainings of the model differ at step {broken.step} in "
            f"{broken.layer or 'the loss'}, so no run could be compared with another: give a model "
            "and batches that are the same each time, and deterministic operations"
        ) from broken


def _without_policy(case: Case) -> dict[int, Mark]:
    model = case.new_model().train()
    base = case.new_optimizer(model.parameters())
    found = {}
    for step in range(min(case.steps, _PLAIN_STEPS)):
        loss = case.backward(model, step)
        step_plainly(base, partial(case.backward, model, step))
        found[step] = mark_of(model, float(loss.detach()))
    return found
