"""What holds for the ways to step: with closures, under gradient scalers, with broken gradients."""

from __future__ import annotations

from typing import Any

import torch

from sparsetrain.storage.latent import LatentTarget
from sparsetrain.storage.masked import MaskedTarget
from sparsetrain.testing.broken import BrokenInvariant, require
from sparsetrain.testing.case import Case, Run, require_alike, tensors_of
from sparsetrain.testing.invariants.holding import require_zeros
from sparsetrain.testing.trees import first_difference, frozen

_BROKEN = (float("nan"), float("inf"), float("-inf"))


def closures_step_alike(case: Case) -> str | None:
    """`step(closure)` gives the run that `backward()` and `step()` give, and the closure's loss.

    The closure is called with masked weights.
    """
    plain, other = case.start(), case.start()
    if plain.needs_closure:
        return "its optimizer steps with closures alone"
    seen: list[int] = []

    def look(step: int) -> None:
        seen.append(step)
        require_zeros(other, step)

    other.disturb = look
    expected = plain.train()
    found = other.train(closure=True)
    require_alike(expected, found, "stepping with a closure differs")
    for step in range(case.steps):
        says = f"the closure was called {seen.count(step)} times"
        require(seen.count(step) == 1, says, step=step)
    return None


def skipped_steps_move_nothing(case: Case) -> str | None:
    """A step moves the clock by one; one that a gradient scaler skips moves nothing at all.

    Neither clock, masks, weights, memory nor random numbers.
    """
    run = case.start()
    if run.needs_closure:
        return "its optimizer steps with closures, which gradient scalers do not allow"
    device = next(iter(run.optimizer.targets.values())).param.device
    scaler = torch.amp.GradScaler(device.type, init_scale=1.0)
    for step in range(case.steps):
        _fill_gradients(run)
        before = frozen(_all_of(run))
        scaler.scale(torch.ones((), device=device))
        scaler.step(run.optimizer)
        scaler.update(1.0)
        different = first_difference(before, _all_of(run))
        says = f"a step that the gradient scaler skipped changed {different}"
        require(different is None, says, step=step)
        run.step(step)
        counted = run.optimizer.step_count
        require(counted == step + 1, f"{counted} steps are counted after it", step=step)
    return None


def _all_of(run: Run) -> dict[str, Any]:
    return {
        "the model": tensors_of(run.model),
        "the wrapped optimizer": run.optimizer.base.state_dict(),
        "the policies": run.optimizer._keeper.state_dict(),
    }


def _fill_gradients(run: Run) -> None:
    for parameter in run.model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, torch.inf)


def gradients_outside_the_mask_do_not_leak(case: Case) -> str | None:
    """NaN and infinite gradients of inactive weights change nothing.

    At steps for which `needs_dense_gradient` does not ask for them.
    """
    clean, dirty = case.start(), case.start()
    broken = 0

    def spoil(step: int) -> None:
        nonlocal broken
        for policy, target in dirty.held:
            gradient = target.param.grad
            if gradient is None or not _is_masked(target) or policy.needs_dense_gradient(step):
                continue
            gradient[~target.mask] = _BROKEN[step % len(_BROKEN)]
            broken += target.numel - target.active

    dirty.disturb = spoil
    expected = clean.train()
    try:
        found = dirty.train()
    except ValueError as error:
        raise BrokenInvariant(f"a broken gradient of inactive weights: {error}") from error
    if not broken:
        return "it uses the gradients of inactive weights, or has none"
    require_alike(expected, found, "a run with broken gradients of inactive weights differs")
    return None


def _is_masked(target: object) -> bool:
    return isinstance(target, MaskedTarget) and not isinstance(target, LatentTarget)
