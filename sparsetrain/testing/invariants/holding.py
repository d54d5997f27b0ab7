"""What holds after every step: counts, structures, zeros."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsetrain.base_state import shaped_state
from sparsetrain.evaluating import evaluation_mode
from sparsetrain.policies import DynamicPolicy, LearnedPolicy, Policy
from sparsetrain.policies.group import TargetGroup
from sparsetrain.storage.latent import LatentTarget
from sparsetrain.storage.learned import LearnedTarget
from sparsetrain.structures import Unstructured
from sparsetrain.targets import SparseTarget
from sparsetrain.testing.broken import require
from sparsetrain.testing.case import Case, Run


@dataclass(frozen=True)
class Quota:
    """So many weights are active in these layers together.

    Attributes:
        since: number of the step after which it holds; -1 for the beginning.
        slack: by how many weights the count may differ.
    """

    layers: tuple[str, ...]
    count: int
    since: int = -1
    slack: float = 0.0


def counts_are_exact(case: Case) -> str | None:
    """Each layer holds as many weights as its policy allocates, to the last one.

    From the beginning; a policy that begins dense from its last update on, within one weight a
    layer (structured, less than one unit over all layers). Where the policy
    leaves the layers' shares to scores, all layers together hold what `sparsity` says. Learned
    masks are steered: they are there when training ends, within the tolerance of their policy.
    """
    run = case.start()
    quotas = [quota for policy, group in run.groups for quota in quotas_of(policy, group)]
    quotas = [quota for quota in quotas if quota.since < case.steps]
    _require_counts(run, quotas, -1)
    for step in run.steps():
        _require_counts(run, quotas, step)
    return None if quotas else "its policy says no count that would hold within these steps"


def _require_counts(run: Run, quotas: list[Quota], step: int) -> None:
    targets = run.optimizer.targets
    at = None if step < 0 else step
    for name, target in targets.items():
        marked = int(target.mask.count_nonzero())
        says = f"{target.active} weights are said to be active, the mask has {marked}"
        require(target.active == marked, says, step=at, layer=name)
    for quota in quotas:
        if step < quota.since:
            continue
        active = sum(targets[name].active for name in quota.layers)
        alone = len(quota.layers) == 1
        within = f" (within {quota.slack:g})" if quota.slack else ""
        require(
            abs(active - quota.count) <= quota.slack,
            f"{active} weights are active{'' if alone else ' in all layers together'}, "
            f"{quota.count}{within} should be",
            step=at,
            layer=quota.layers[0] if alone else None,
        )


def quotas_of(policy: Policy, group: TargetGroup) -> list[Quota]:
    """What a policy says about its counts."""
    if isinstance(policy, LearnedPolicy) and policy.is_steered:
        return _steered(policy, group)
    since, only_drops = -1, isinstance(policy, DynamicPolicy) and policy.starts_dense
    if isinstance(policy, DynamicPolicy) and only_drops:
        since = policy.stop_step() - 1
    densities = policy.target_densities(group)
    unit = max(policy.structure.quantum(target.shape) for target in group.targets)
    # What was dropped on the way cannot come back, should rounding ask for it in the end. One
    # weight is rounding; with units of several the total alone is what such a policy reaches.
    found = [
        Quota((t.name,), round(densities[t.name] * t.numel), since, slack=int(only_drops))
        for t in group.targets
        if t.name in densities and not (only_drops and unit > 1)
    ]
    if (only_drops or len(found) < len(group.targets)) and policy.sparsity is not None:
        names = tuple(target.name for target in group.targets)
        slack = unit - 1 if only_drops else 0
        found.append(Quota(names, sum(policy.counts(group).values()), since, slack))
    return found


def _steered(policy: LearnedPolicy, group: TargetGroup) -> list[Quota]:
    """Where steering leads to, at the last step."""
    assert policy.total_steps is not None  # else nothing would be steered
    found = []
    for budget in policy.budgets(group):
        names = tuple(target.name for target in budget.targets)
        gate = max(target.learned.sharing.size for target in budget.targets)
        slack = max(0.0 if policy.exact else budget.tolerance, gate - 1)
        found.append(Quota(names, budget.keep, policy.total_steps - 1, slack))
    return found


def structures_hold(case: Case) -> str | None:
    """Structured masks are made of whole units, as many in each group (n of m, rows, blocks)."""
    run = case.start()
    if not any(_is_structured(policy) for policy, _ in run.held):
        return "its policy chooses weights one by one"
    _require_structured(run, None)
    for step in run.steps():
        _require_structured(run, step)
    return None


def _is_structured(policy: Policy) -> bool:
    return not isinstance(policy.structure, Unstructured)


def _require_structured(run: Run, step: int | None) -> None:
    for policy, target in run.held:
        if not _is_structured(policy):
            continue
        units = policy.structure.units(target.mask.float()) > 0
        whole = policy.structure.expand(units, target.shape)
        says = f"the mask is not made of whole units of {policy.structure!r}"
        require(torch.equal(whole, target.mask), says, step=step, layer=target.name)
        kept = units.sum(1)
        says = f"groups of {policy.structure!r} keep {int(kept.min())} to {int(kept.max())} units"
        require(bool((kept == kept[0]).all()), says, step=step, layer=target.name)


def inactive_weights_are_zero(case: Case) -> str | None:
    """Weights outside the mask are exactly 0, for whoever looks: after a step, and in its hooks.

    Of learned masks those weights that evaluation computes with.
    """
    run = case.start()
    if not any(_has_zeros(target) for _, target in run.held):
        return "its storage holds nothing but active weights"
    require_zeros(run, None)
    _train_and_look(run, lambda step: require_zeros(run, step))
    return None


def _train_and_look(run: Run, look: Callable[[int], None]) -> None:
    """Look where a user can, after each step: in hooks of both optimizers, and when it is over."""
    clock = [0]

    def hook(*_: object) -> None:
        look(clock[0])

    run.optimizer.base.register_step_post_hook(hook)
    run.optimizer.register_step_post_hook(hook)
    for step in range(run.case.steps):
        clock[0] = step
        run.step(step)
        look(step)


def require_zeros(run: Run, step: int | None) -> None:
    """Raise `BrokenInvariant` for a weight outside its mask that is not 0."""
    for name, target in run.optimizer.targets.items():
        if _has_zeros(target):
            for weight in _weights_seen(run, target):
                wrong = int(weight[~target.mask].count_nonzero())
                says = f"{wrong} weights outside the mask are not 0"
                require(wrong == 0, says, step=step, layer=name)


def _has_zeros(target: SparseTarget) -> bool:
    return target.holds_zeros or isinstance(target, LearnedTarget)


def _weights_seen(run: Run, target: SparseTarget) -> Iterator[Tensor]:
    """The weight, everywhere that the network computes with it."""
    if not isinstance(target, LearnedTarget):
        yield target.param.detach()
        return
    with torch.no_grad(), evaluation_mode(run.model):
        for module, leaf in target.places:
            yield getattr(module, leaf)


def inactive_state_is_zero(case: Case) -> str | None:
    """The optimizer's state of weights outside the mask is exactly 0, whatever it is called.

    After a step, and in its hooks.
    """
    run = case.start()
    if not any(_rests(target) for _, target in run.held):
        return "its inactive weights have no state, or train on behind the mask"

    def look(step: int) -> None:
        for _, target in run.held:  # csr storage may have taken some of them meanwhile
            if _rests(target):
                _require_resting(run, target, step)

    _train_and_look(run, look)
    return None


def _rests(target: SparseTarget) -> bool:
    return target.holds_zeros and not isinstance(target, LatentTarget)


def _require_resting(run: Run, target: SparseTarget, step: int) -> None:
    state = run.optimizer.state.get(target.param, {})
    for key, values in shaped_state(state, target.param):
        wrong = int(values[~target.mask].count_nonzero())
        says = f"{key!r} is not 0 for {wrong} weights outside the mask"
        require(wrong == 0, says, step=step, layer=target.name)
