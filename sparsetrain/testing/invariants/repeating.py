"""What holds when a run is repeated, resumed or copied: it is the same run, bit by bit."""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from sparsetrain.testing.broken import BrokenInvariant, require
from sparsetrain.testing.case import (
    Case,
    Mark,
    Run,
    fingerprint,
    has_cuda_started,
    require_alike,
    seed_torch,
    step_plainly,
)
from sparsetrain.testing.trees import first_difference, frozen


def seeds_repeat_runs(case: Case) -> str | None:
    """Two runs of one seed are the same, whatever the process has drawn or trained before.

    Everything random comes from `group.generator`, and nothing is remembered but in
    `group.memory`.
    """
    with _own_random_numbers():
        first, second = _with_other_random_numbers(case, 1), _with_other_random_numbers(case, 2)
    why = (
        "drawn from group.generator and remembered in group.memory alone, a second run is the same"
    )
    require_alike(first, second, f"{why}; this one differs")
    return None


def _with_other_random_numbers(case: Case, seed: int) -> dict[int, Mark]:
    def seeded(step: int) -> None:
        seed_torch(1_000_003 * seed + step)
        random.seed(1_000_003 * seed + step)
        np.random.seed(1_000_003 * seed + step)  # noqa: NPY002

    seeded(-1)
    run = case.start()
    run.disturb = seeded
    return run.train()


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """Python's and numpy's global random numbers go on afterwards as if nothing had been."""
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002


def global_random_numbers_are_left_alone(case: Case) -> str | None:
    """Wrapping, steps and `finalize` draw nothing from the random numbers that are the user's.

    Those of torch, numpy and Python.
    """
    model = case.new_model().train()
    base = case.new_optimizer(model.parameters())
    before = _random_states()
    run = Run(case, model, case.wrap(base, model))
    _require_undrawn(before, "wrapping the optimizer", None)

    def remember(step: int) -> None:
        before.update(_random_states())

    run.disturb = remember
    for step in run.steps():
        _require_undrawn(before, "a step", step)
    before = _random_states()
    run.optimizer.finalize()
    _require_undrawn(before, "finalize()", None)
    return None


def _random_states() -> dict[str, Any]:
    kind, words, *rest = np.random.get_state()  # noqa: NPY002
    found: dict[str, Any] = {
        "torch": fingerprint(torch.get_rng_state()),
        "numpy": (kind, np.asarray(words).tobytes(), *rest),
        "Python": random.getstate(),
    }
    if has_cuda_started():
        found["CUDA"] = [fingerprint(state) for state in torch.cuda.get_rng_state_all()]
    return found


def _require_undrawn(before: dict[str, Any], what: str, step: int | None) -> None:
    for whose, state in _random_states().items():
        drawn = f"{what} drew from {whose}'s global random numbers; use group.generator"
        require(state == before[whose], drawn, step=step)


def resumed_runs_are_the_same(case: Case) -> str | None:
    """A run that goes on from a checkpoint equals the one that was never stopped.

    At several steps; saved with `torch.save`, read with `weights_only=True`, loaded into a wrap of
    another seed, the model's state dict first or last.
    """
    run, stops = case.start(), _stops(case)
    expected: dict[int, Mark] = {}
    saved: dict[int, io.BytesIO] = {}
    for step in range(case.steps + 1):
        if step in stops:
            saved[step] = _written(run, step)
        if step < case.steps:
            expected |= run.train(step, step + 1)
    for number, (stop, file) in enumerate(saved.items()):
        model_first = number % 2 == 1 and case.storage == "masked"
        _require_resumed(case, file, stop, expected, model_first=model_first)
    return None


def _stops(case: Case) -> list[int]:
    """The start, the first steps, some in between, and one before the end."""
    return sorted({0, 1, case.steps // 3, case.steps // 2, case.steps - 1})


def _written(run: Run, step: int) -> io.BytesIO:
    file = io.BytesIO()
    try:
        state = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}
        torch.save(state, file)
    except Exception as error:
        raise _no_checkpoint("cannot be written", error, step) from error
    return file


def _read(file: io.BytesIO, step: int) -> dict[str, Any]:
    file.seek(0)
    try:
        saved: dict[str, Any] = torch.load(file, weights_only=True)
    except Exception as error:
        raise _no_checkpoint("does not load with weights_only=True", error, step) from error
    return saved


def _no_checkpoint(what: str, error: Exception, step: int) -> BrokenInvariant:
    first = [*str(error).strip().splitlines(), ""][0]
    advice = "keep tensors, numbers and strings in group.memory"
    return BrokenInvariant(f"the checkpoint {what}: {advice} ({first})", step=step)


def _require_resumed(
    case: Case, file: io.BytesIO, stop: int, expected: dict[int, Mark], *, model_first: bool
) -> None:
    saved = _read(file, stop)
    run = case.start(seed=case.seed + 1)
    state = saved["optimizer"]
    before = frozen(state)
    if model_first:
        run.model.load_state_dict(saved["model"])
        run.optimizer.load_state_dict(state)
    else:
        run.optimizer.load_state_dict(state)
        run.model.load_state_dict(saved["model"])
    changed = first_difference(before, state)
    require(changed is None, f"loading changed {changed} of the caller's dict", step=stop)
    require_alike(expected, run.train(stop), f"a run resumed at step {stop} differs")


def copies_go_on_alike(case: Case) -> str | None:
    """A `copy.deepcopy` of model and optimizer together trains on as the original does.

    Neither changes the other.
    """
    if why := _why_not_copied(case):
        return why
    expected = case.start().train()
    for stop in sorted({case.steps // 3, 2 * case.steps // 3}):
        run = case.start()
        run.advance(0, stop)
        twin = Run(case, *copy.deepcopy((run.model, run.optimizer)))
        for name, target in twin.optimizer.targets.items():
            shared = target.param is run.optimizer.targets[name].param
            require(not shared, "a copy shares the original's weight", step=stop, layer=name)
        require_alike(expected, twin.train(stop), f"a copy made at step {stop} differs")
        why = f"a run whose copy, made at step {stop}, was trained differs"
        require_alike(expected, run.train(stop), why)
    return None


def _why_not_copied(case: Case) -> str | None:
    """Why a copy of the optimizer cannot step even without a policy, as one of LBFGS cannot."""
    model = case.new_model()
    twin, base = copy.deepcopy((model, case.new_optimizer(model.parameters())))
    case.backward(twin, 0)
    try:
        step_plainly(base, partial(case.backward, twin, 0))
    except Exception as error:
        return f"a copy of its optimizer cannot step even without a policy ({error})"
    return None
