"""Learning rates after pruning: every rule against its curve, on any optimizer."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from runs import SmallNet, backward
from torch import nn
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

import sparsetrain as st

TOTAL = 20


def sgd(rates: tuple[float, ...] = (0.1,)) -> torch.optim.Optimizer:
    groups = [{"params": [nn.Parameter(torch.zeros(2))], "lr": rate} for rate in rates]
    return torch.optim.SGD(groups, momentum=0.9)


def curve(optimizer: torch.optim.Optimizer, scheduler: LRScheduler, steps: int) -> list[float]:
    """The rates of the first group, as a loop has them."""
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def steps_down(optimizer: torch.optim.Optimizer) -> LRScheduler:
    return MultiStepLR(optimizer, [10, 15], gamma=0.1)


def test_a_share_of_the_original_rate() -> None:
    optimizer = sgd()
    found = curve(optimizer, st.Finetune().scheduler(optimizer, TOTAL), TOTAL)
    assert found == pytest.approx([0.01] * TOTAL)
    optimizer = sgd()
    found = curve(optimizer, st.Finetune(factor=0.01).scheduler(optimizer, TOTAL, steps_down), 5)
    assert found == pytest.approx([0.001] * 5)


def test_warm_up_and_cosine() -> None:
    rule = st.Finetune(factor=0.5, steps=10, warmup=3, shape="cosine")
    optimizer = sgd()
    found = curve(optimizer, rule.scheduler(optimizer, TOTAL), 10)
    rising = [0.05 * share / 4 for share in (1, 2, 3)]
    falling = [0.05 * (1 + math.cos(math.pi * k / 7)) / 2 for k in range(7)]
    assert found == pytest.approx(rising + falling)
    # Without a warm-up it is torch's own cosine.
    optimizer, twin = sgd(), sgd()
    mine = st.Finetune(factor=1, shape="cosine").scheduler(optimizer, TOTAL)
    theirs = CosineAnnealingLR(twin, TOTAL)
    assert curve(optimizer, mine, TOTAL) == pytest.approx(curve(twin, theirs, TOTAL))


def test_the_last_rate() -> None:
    optimizer = sgd()
    scheduler = st.Finetune(rule="last", steps=30).scheduler(optimizer, TOTAL, steps_down)
    assert curve(optimizer, scheduler, 30) == pytest.approx([0.001] * 30)


def originals() -> dict[str, Any]:
    def warm_cosine(optimizer: torch.optim.Optimizer) -> LRScheduler:
        parts: list[Any] = [LinearLR(optimizer, 0.1, 1.0, 5), CosineAnnealingLR(optimizer, 15)]
        return SequentialLR(optimizer, parts, [5])

    return {
        "steps": steps_down,
        "cosine": lambda optimizer: CosineAnnealingLR(optimizer, TOTAL),
        "lambda": lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (1 + step)),
        "one cycle": lambda optimizer: OneCycleLR(optimizer, 0.3, total_steps=TOTAL + 1),
        "warm cosine": warm_cosine,
    }


@pytest.mark.parametrize("name", originals())
@pytest.mark.parametrize("steps", [1, 7, TOTAL, None])
def test_rewinding_repeats_the_end_of_the_original(name: str, steps: int | None) -> None:
    make = originals()[name]
    twin = sgd()
    whole = curve(twin, make(twin), TOTAL)
    rule = st.Finetune(rule="rewind", steps=steps)
    optimizer = sgd()
    scheduler = rule.scheduler(optimizer, TOTAL, make)
    span = rule.span(TOTAL)
    assert list(span) == list(range(TOTAL - (steps or TOTAL), TOTAL))
    assert curve(optimizer, scheduler, len(span)) == pytest.approx(whole[span.start :])
    # It stays at the last rate if training goes on.
    assert curve(optimizer, scheduler, 3) == pytest.approx([whole[-1]] * 3)


def test_rewinding_with_a_warm_up() -> None:
    rule = st.Finetune(rule="rewind", steps=8, warmup=1)
    optimizer = sgd()
    found = curve(optimizer, rule.scheduler(optimizer, TOTAL, steps_down), 8)
    assert found == pytest.approx([0.005, 0.01, 0.01] + [0.001] * 5)


def test_every_group_has_its_own_rate() -> None:
    optimizer = sgd((0.1, 0.4, 0.0))
    scheduler = st.Finetune(rule="last").scheduler(optimizer, TOTAL, steps_down)
    assert scheduler.get_last_lr() == pytest.approx([0.001, 0.004, 0.0])


def test_an_optimizer_that_was_scheduled_before() -> None:
    """What counts is the rate that training began with, not the one that it ended with."""
    optimizer = sgd()
    curve(optimizer, steps_down(optimizer), TOTAL)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)
    st.Finetune().scheduler(optimizer, TOTAL)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    st.Finetune(rule="rewind", steps=8).scheduler(optimizer, TOTAL, steps_down)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


@pytest.mark.parametrize("rule", ["scaled", "last", "rewind"])
@pytest.mark.parametrize("policy", ["static", "rigl"])
def test_a_sparse_optimizer_is_scheduled(rule: Any, policy: str) -> None:
    model = SmallNet()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"total_steps": 8, "update": {"every": 2}} if policy == "rigl" else {}
    recipe = {"policy": {"kind": policy, "sparsity": 0.5, **options}}
    optimizer = st.SparseOptimizer(base, model, recipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = st.Finetune(rule=rule, steps=8).scheduler(optimizer, TOTAL, steps_down)
        seen = []
        for step in range(8):
            seen.append(base.param_groups[0]["lr"])
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()
            scheduler.step()
    expected = {"scaled": [0.01] * 8, "last": [0.001] * 8, "rewind": [0.01] * 3 + [0.001] * 5}
    assert seen == pytest.approx(expected[rule])
    assert optimizer.sparsity() == 0.5


def test_the_optimizer_is_not_touched_by_reading_rates() -> None:
    optimizer = torch.optim.Adam([nn.Parameter(torch.ones(3))], lr=0.2)
    before = copy.deepcopy(optimizer.state_dict())
    from sparsetrain.finetuning.rates import rates_of

    cycle = originals()["one cycle"]  # it moves betas, too
    rates_of(optimizer, TOTAL, cycle)
    assert optimizer.state_dict() == before


def test_a_scheduler_goes_on_from_its_state() -> None:
    rule = st.Finetune(rule="rewind", steps=9)
    optimizer, twin = sgd(), sgd()
    scheduler, other = (rule.scheduler(one, TOTAL, steps_down) for one in (optimizer, twin))
    curve(optimizer, scheduler, 4)
    state = copy.deepcopy(scheduler.state_dict())
    assert "rates" not in state
    other.load_state_dict(state)
    twin.load_state_dict(optimizer.state_dict())
    assert curve(twin, other, 5) == curve(optimizer, scheduler, 5)


@given(
    factor=some.floats(1e-3, 1),
    steps=some.integers(1, 30),
    warmup=some.integers(0, 29),
    shape=some.sampled_from(["constant", "cosine"]),
)
def test_rates_rise_and_fall_within_bounds(
    factor: float, steps: int, warmup: int, shape: Any
) -> None:
    warmup = min(warmup, steps - 1)
    optimizer = sgd()
    rule = st.Finetune(factor=factor, steps=steps, warmup=warmup, shape=shape)
    found = curve(optimizer, rule.scheduler(optimizer, TOTAL), steps)
    assert all(0 < rate <= 0.1 * factor * (1 + 1e-12) for rate in found)
    assert max(found) == pytest.approx(0.1 * factor)
    rising, falling = found[: warmup + 1], found[warmup:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert st.Finetune.model_validate(rule.model_dump()) == rule


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"factor": 0}, "factor"),
        ({"factor": 1.5}, "factor"),
        ({"steps": 0}, "steps"),
        ({"warmup": -1}, "warmup"),
        ({"rule": "rewnd"}, "rule"),
        ({"rates": 3}, "rates"),
        ({"rule": "last", "factor": 0.1}, "factor=0.1 needs rule='scaled', not 'last'"),
        ({"rule": "rewind", "shape": "cosine"}, "has the original's shape"),
        ({"steps": 5, "warmup": 5}, "warmup=5 must be less than steps=5"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        st.Finetune(**fields)


def test_originals_that_cannot_be_read() -> None:
    optimizer, rule = sgd(), st.Finetune(rule="rewind", steps=5)
    with pytest.raises(ValueError, match=r"steps=5 cannot be rewound: .* has 4"):
        rule.scheduler(optimizer, 4, steps_down)
    with pytest.raises(ValueError, match="less than the 4 steps to train"):
        st.Finetune(warmup=4).scheduler(optimizer, 4)
    with pytest.raises(ValueError, match="on the optimizer that it is given"):
        rule.scheduler(optimizer, 8, lambda _: steps_down(sgd()))
    with pytest.raises(ValueError, match="ReduceLROnPlateau depend on metrics"):
        rule.scheduler(optimizer, 8, lambda one: ReduceLROnPlateau(one))  # type: ignore[arg-type, return-value]
    st.Finetune().scheduler(optimizer, 8, lambda one: ReduceLROnPlateau(one))  # type: ignore[arg-type, return-value]
