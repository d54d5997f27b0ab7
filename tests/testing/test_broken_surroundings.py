"""Optimizers, scalers, models and scores with a fault; arguments that do not fit; reports."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import pytest
import torch
from runs import POLICIES
from torch import Tensor, nn
from torch.nn import Parameter

import sparsetrain as st
from sparsetrain import testing
from sparsetrain.calibration import Calibration
from sparsetrain.candidates import Candidate

SET = POLICIES["set"]


def broken_by(**options: Any) -> testing.BrokenInvariant:
    """What is raised for a policy that is right with something that is not."""
    with pytest.raises(testing.BrokenInvariant) as raised:
        testing.check_policy(**{"policy": SET, "optimizer": "sgd"} | options)
    return raised.value


# Optimizers.


def test_closures_that_are_called_twice() -> None:
    class Twice(torch.optim.SGD):
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            if closure is not None:
                with torch.enable_grad():
                    closure()
            return super().step(closure)

    broken = broken_by(optimizer={"twice": lambda p: Twice(p, lr=0.1)})
    assert broken.invariant == "closures_step_alike"
    assert (broken.optimizer, broken.step, broken.layer) == ("twice", 0, "norm.running_mean")


def test_closures_that_see_unmasked_weights() -> None:
    class Perturbs(torch.optim.SGD):
        """Looks at the loss a little way off, as SAM does, and goes back."""

        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            off = 0.0 if closure is None else 0.1
            with torch.no_grad():
                for param in self.param_groups[0]["params"]:
                    param.data.add_(off)  # not counted by torch
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
                for param in self.param_groups[0]["params"]:
                    param.data.sub_(off)
                super().step()
                return loss
            return super().step()

    only = ["closures_step_alike"]
    broken = broken_by(optimizer=lambda p: Perturbs(p, lr=0.1), only=only)
    assert broken.invariant == "closures_step_alike" and broken.optimizer == "<lambda>"


def test_scalers_that_do_not_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.amp.GradScaler, "step", lambda self, optimizer: optimizer.step())
    broken = broken_by(policy=POLICIES["static"])
    assert broken.invariant == "skipped_steps_move_nothing" and broken.step == 0
    assert "that the gradient scaler skipped changed the model." in str(broken)


def test_skipped_steps_that_move_the_clock_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def counts(self: Any, optimizer: st.SparseOptimizer) -> None:
        optimizer._keeper.step_count += 1

    monkeypatch.setattr(torch.amp.GradScaler, "step", counts)
    broken = broken_by(only="skipped_steps_move_nothing")
    assert "changed the policies.step_count" in str(broken)


def test_state_that_is_stale_after_growth(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsetrain.storage.masked import MaskedTarget

    monkeypatch.setattr(MaskedTarget, "renewed", lambda self, tensor, gone, new, fresh: tensor)
    broken = broken_by(optimizer="adamw")
    assert broken.invariant == "inactive_state_is_zero"
    assert "'exp_avg' is not 0" in str(broken) and broken.layer == "conv.weight"


# Models.


class GrowsNames(nn.Module):
    """Has a buffer only when it has seen something."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "calls"):
            self.register_buffer("calls", torch.zeros(()))
        return self.head(torch.relu(self.layer(x)))


class NeverTheSame(GrowsNames):
    """Has noise of its own, which no seed reaches."""

    numbers = itertools.count()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + next(self.numbers))


def vectors(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(5, 6, generator=generator)
    return x, torch.randint(3, (5,), generator=generator)


def test_models_whose_names_change() -> None:
    with pytest.raises(testing.BrokenInvariant) as raised:
        testing.check_model(GrowsNames(), SET, vectors, optimizer="sgd")
    assert raised.value.invariant == "state_dict_names_stay"
    assert "has 'calls', unlike a plain model's" in str(raised.value)


def test_models_that_no_seed_repeats_are_refused() -> None:
    with pytest.raises(ValueError, match=r"without any policy.*differ at step 0 in layer\.weight"):
        testing.check_model(NeverTheSame(), SET, vectors, optimizer="sgd")


def test_functions_that_make_another_model_each_time_are_refused() -> None:
    with pytest.raises(ValueError, match="without any policy, two trainings"):
        testing.check_model(GrowsNames, SET, vectors, optimizer="sgd")


def test_batches_of_an_iterable_come_in_turn() -> None:
    seen: list[int] = []

    def loader() -> Any:
        for step in itertools.count():
            seen.append(step)
            yield list(vectors(step))

    only = ["counts_are_exact"]
    report = testing.check_model(
        nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), SET, loader(), only=only
    )
    assert report.held == ("counts_are_exact",)
    assert seen == list(range(14))


# Arguments.


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown name in only": ({"only": ["counts_are_exakt"]}, "did you mean 'counts_are_exact'"),
    "unknown name in skip": ({"skip": "no_such_thing"}, "there is no invariant 'no_such_thing'"),
    "nothing left": (
        {"only": ["counts_are_exact"], "skip": ["counts_are_exact"]},
        "leave no invariant",
    ),
    "unknown optimizer": ({"optimizer": "momentun"}, r"\(did you mean .*'momentum'"),
    "model without batches": ({"model": GrowsNames}, "'model' and 'batches' go together"),
    "batches without model": ({"batches": vectors}, "'model' and 'batches' go together"),
    "batches of one": (
        {"model": GrowsNames(), "batches": [torch.zeros(2, 6)]},
        r"yield \(inputs, targets\)",
    ),
    "too long": (
        {"policy": st.RigL(sparsity=0.5, total_steps=20_000)},
        "for 20000 steps.*total_steps=14",
    ),
    "too short": ({"steps": 1}, "steps=1: a run needs two steps"),
    "no update in time": (
        {
            "policy": st.SET(sparsity=0.5, total_steps=999, update={"every": 9, "start": 50}),
            "steps": 14,
        },
        "'set' makes no update in 14 steps",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_arguments_that_do_not_fit_are_refused(name: str) -> None:
    options, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        testing.check_policy(**{"policy": SET} | options)


def test_invariants_of_ones_own() -> None:
    def at_least_half_is_zero(case: testing.Case) -> str | None:
        """At least half of all weights are 0."""
        run = case.start()
        for step in run.steps():
            sparsity = run.optimizer.sparsity()
            testing.require(sparsity >= 0.5, f"{sparsity:.2f} of them are", step=step)
        return None

    mine = [*testing.INVARIANTS, at_least_half_is_zero]
    only = ["at_least_half_is_zero"]
    report = testing.check_policy(SET, optimizer="sgd", invariants=mine, only=only)
    assert report.held == ("at_least_half_is_zero",)
    broken = broken_by(policy=SET.with_sparsity(0.3), invariants=mine, only=only)
    assert str(broken) == (
        "at_least_half_is_zero at step 0, with optimizer 'sgd': 0.30 of them are"
    )


def test_reports_can_be_read() -> None:
    report = testing.check_policy(
        POLICIES["gradual"], optimizer="sgd", only=["counts_are_exact", "structures_hold"]
    )
    assert str(report).splitlines() == [
        "gradual over 14 steps with sgd: 1 invariants hold",
        "  counts_are_exact",
        "  structures_hold: left out, its policy chooses weights one by one",
    ]


def test_skipped_invariants_are_not_checked() -> None:
    names = [invariant.__name__ for invariant in testing.INVARIANTS]
    report = testing.check_policy(SET, optimizer="sgd", skip=names[1:])
    assert report.held == (names[0],)


def test_optimizers_with_closures_alone_and_without_copies() -> None:
    report = testing.check_policy(SET, optimizer="lbfgs")
    assert set(report.left_out) == {
        "structures_hold",
        "copies_go_on_alike",
        "closures_step_alike",
        "skipped_steps_move_nothing",
    }
    assert "even without a policy" in report.left_out["copies_go_on_alike"]


# Scores.


@pytest.fixture
def _known_scores_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(st.Score, "members", dict(st.Score.members))


def one_row_short(values: Tensor, param: Parameter) -> Tensor:
    return values[1:]


def not_finite(values: Tensor, param: Parameter) -> Tensor:
    return values / 0.0


def at_random(values: Tensor, param: Parameter) -> Tensor:
    return values + torch.rand(values.shape)


def by_numpy(values: Tensor, param: Parameter) -> Tensor:
    return values + np.random.default_rng().random()


def writes_to_the_weight(values: Tensor, param: Parameter) -> Tensor:
    param.detach().mul_(2.0)
    return values


@pytest.mark.usefixtures("_known_scores_stay")
@pytest.mark.parametrize(
    ("fault", "whole", "step"),
    [
        (one_row_short, "shapes_fit", "steps_are_scored"),
        (not_finite, "shapes_fit", "steps_are_scored"),
        (at_random, "measuring_repeats", "steps_are_scored"),
        (by_numpy, "measuring_repeats", "steps_are_scored"),
        (writes_to_the_weight, "measuring_changes_nothing", "steps_are_scored"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_scores_with_a_fault(
    fault: Callable[[Tensor, Parameter], Tensor], whole: str, step: str
) -> None:
    class OfModels(st.Score):
        kind: Literal["of_models"] = "of_models"

        def measure(
            self, model: nn.Module, candidates: list[Candidate], calibration: Calibration
        ) -> dict[str, Tensor]:
            return {c.name: fault(c.param.detach().abs(), c.param) for c in candidates}

    class OfSteps(st.Score):
        kind: Literal["of_steps"] = "of_steps"

        def measure(self, *_: Any) -> dict[str, Tensor]:
            raise ValueError("for training alone")

        def of(
            self,
            name: str,
            param: Parameter,
            state: Mapping[str, Any],
            generator: torch.Generator,
        ) -> Tensor:
            return fault(param.detach().abs(), param)

    for score, invariant in ((OfModels(), whole), (OfSteps(), step)):
        with pytest.raises(testing.BrokenInvariant) as raised:
            testing.check_score(score)
        assert raised.value.invariant == invariant, str(raised.value)
        assert raised.value.layer == "conv.weight" or "random numbers" in raised.value.what


@pytest.mark.usefixtures("_known_scores_stay")
def test_scores_that_share_a_kind() -> None:
    class Another(st.Magnitude):
        pass

    assert Another.model_fields["kind"].default == "magnitude"
    with pytest.raises(testing.BrokenInvariant, match=r"scores_round_trip.*is Another when"):
        testing.check_score(st.Magnitude())


# What it costs those who do not use it.


def test_nobody_pays_who_does_not_use_it() -> None:
    script = """
import sys
import sparsetrain
assert not [name for name in sys.modules if name.startswith("sparsetrain.testing")]
from sparsetrain import testing
testing.check_policy(sparsetrain.Static(sparsity=0.5), only="recipes_round_trip")
assert not {"hypothesis", "pytest", "_pytest"} & sys.modules.keys()
sys.modules["hypothesis"] = None
try:
    from sparsetrain.testing import strategies
except ImportError as error:
    assert "pip install 'sparsetrain[testing]'" in str(error)
else:
    raise SystemExit("strategies were imported without hypothesis")
"""
    subprocess.run([sys.executable, "-c", script], check=True)
