"""The sparsest network that is still good enough, and what is promised of it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from searches import (
    NAMES,
    PRICES,
    SIZES,
    Counting,
    bound,
    by_width,
    by_zeros,
    inputs,
    net,
    own,
    set_zeros,
    zeros,
)
from torch import nn

import sparsetrain as st
from sparsetrain.search import Channels, MaxSparsity, max_sparsity, sensitivity


def searched(metric: Any = by_zeros, tolerance: float = 0.25, **options: Any) -> MaxSparsity:
    return max_sparsity(net(), metric, tolerance, **{"example_inputs": inputs(), **options})


def share(model: nn.Module) -> float:
    return sum(zeros(model)[name] * size for name, size in SIZES.items()) / sum(SIZES.values())


@given(
    tolerance=some.floats(0.01, 0.9),
    resolution=some.sampled_from([0.1, 0.02, 0.005]),
    most=some.floats(0.5, 0.99),
)
@settings(max_examples=20)
def test_a_metric_that_falls_steadily(tolerance: float, resolution: float, most: float) -> None:
    """The highest sparsity of the path, within the resolution."""
    found = searched(tolerance=tolerance, resolution=resolution, most=most)
    assert found.metric == by_zeros(found.model) >= 1 - tolerance
    assert zeros(found.model) == pytest.approx(found.ratios)
    assert found.sparsity == pytest.approx(share(found.model))
    knobs = found.knobs

    def holds(place: float) -> bool:
        real = knobs.rounded(knobs.uniform(place * most))
        return 1 - sum(PRICES[name] * ratio**2 for name, ratio in real.items()) >= 1 - tolerance

    if holds(1.0):
        assert found.ratios == knobs.rounded(knobs.uniform(most))
        return
    steps = [number / 200 for number in range(201)]
    best = max(place for place in steps if holds(place))
    assert found.sparsity >= knobs.share(knobs.uniform(max(best - resolution, 0) * most)) - 1e-9
    assert len(found.tried) <= 2 + 1 / resolution**0.5


@pytest.mark.parametrize("along", ["uniform", "ranked"])
def test_a_metric_that_falls_and_rises(along: Any) -> None:
    """Good at few zeros and at 60 to 70 percent: either is an answer, none in between."""

    def metric(model: nn.Module) -> float:
        return 1.0 if share(model) < 0.2 or 0.6 < share(model) < 0.7 else 0.0

    for resolution in (0.3, 0.1, 0.01):
        for most in (0.99, 0.9, 0.7, 0.65):
            found = searched(metric, 0.5, along=along, resolution=resolution, most=most)
            assert found.metric == metric(found.model) == 1.0


class Noisy:
    """A metric with noise; remembers what it has seen last."""

    def __init__(self, seed: int, size: float) -> None:
        self.random, self.size = random.Random(seed), size
        self.seen: list[tuple[nn.Module, float]] = []

    def __call__(self, model: nn.Module) -> float:
        value = by_zeros(model) + self.random.gauss(0, self.size)
        self.seen.append((model, value))
        return value


@settings(max_examples=60)
@given(
    seed=some.integers(0, 10_000),
    size=some.sampled_from([0.01, 0.1, 0.5]),
    tolerance=some.sampled_from([0.0, 0.05, 0.3]),
    repeats=some.integers(1, 3),
)
def test_the_promise_with_noise(seed: int, size: float, tolerance: float, repeats: int) -> None:
    """The returned network is the one that was evaluated last, and that evaluation keeps it."""
    metric = Noisy(seed, size)
    found = searched(metric, tolerance, repeats=repeats, resolution=0.05)
    values = [value for _, value in metric.seen]
    assert found.baseline == pytest.approx(sum(values[:repeats]) / repeats)
    if not any(found.ratios.values()):  # none kept it
        assert found.metric == found.baseline
        assert found.model.state_dict().keys() == net().state_dict().keys()
        assert zeros(found.model) == zeros(net())
        return
    assert metric.seen[-1] == (found.model, found.metric)
    assert found.metric >= found.baseline - tolerance
    # So does the mean of its evaluations in the search, which were of other copies.
    in_search = [m for s, m in found.tried if s == pytest.approx(found.sparsity)]
    assert in_search and min(in_search) >= found.baseline - tolerance
    assert all(found.model is not model for model, _ in metric.seen[:-1])


def test_a_network_has_one_chance_in_the_end() -> None:
    """At a coarse path the same network is met again and again; its last evaluation is one."""
    calls: list[int] = []

    def metric(model: Any) -> float:
        width = model[0].out_features
        calls.append(width)
        return 1.0 if width > 1 and calls.count(width) == 1 else 0.0

    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    options: dict[str, Any] = {"prune": Channels(), "example_inputs": torch.randn(2, 4)}
    found = max_sparsity(model, metric, 0.5, most=0.9, **options)
    assert len(found.tried) > 6  # most of them known
    assert calls == [4, 1, 3, 2, 2, 3]
    assert found.sparsity == 0 and found.model[0].out_features == 4


def test_an_evaluation_that_trains_the_copy() -> None:
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def metric(pruned: Any) -> float:
        with torch.no_grad():
            pruned[4].bias += 1.0
        return by_zeros(pruned)

    found = max_sparsity(model, metric, 0.25)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(found.model[4].bias, model[4].bias + 1.0)
    assert found.metric == by_zeros(found.model) >= 0.75


def test_nothing_is_good_enough() -> None:
    model = net()
    set_zeros(model, {"0.weight": 0.5})

    values = iter([1.0])
    found = max_sparsity(model, lambda pruned: next(values, 0.0), 0.5)
    assert found.model is not model
    state = model.state_dict()
    assert all(value.equal(state[name]) for name, value in found.model.state_dict().items())
    # It has the zeros that it had.
    assert found.ratios == pytest.approx({"0.weight": 0.5, "2.weight": 0.0, "4.weight": 0.0})
    assert found.sparsity == pytest.approx(24 / 114)
    assert found.metric == found.baseline


@pytest.mark.parametrize("stop", [0, 1, 4])
@pytest.mark.parametrize("repeats", [1, 2])
def test_it_goes_on_where_it_was_stopped(tmp_path: Path, stop: int, repeats: int) -> None:
    whole, metric = Counting(), Counting()
    expected = searched(whole, repeats=repeats)
    metric.stop_at = stop
    with pytest.raises(KeyboardInterrupt):
        searched(metric, repeats=repeats, folder=tmp_path)
    metric.stop_at = None
    found = searched(metric, repeats=repeats, folder=tmp_path)
    assert metric.calls == whole.calls == expected.evaluations == found.evaluations + stop
    assert (found.ratios, found.tried, found.metric) == (
        expected.ratios,
        expected.tried,
        expected.metric,
    )
    # The network itself is in no file: to give it, it is evaluated once more.
    again = searched(metric, repeats=repeats, folder=tmp_path, progress=True)
    assert again.evaluations == 1 and again.ratios == found.ratios


def test_other_paths() -> None:
    measured = sensitivity(net(), by_zeros, (0.25, 0.5, 0.75, 0.95))
    found = searched(along=measured)
    uniform = searched()
    assert found.metric >= 0.75 and found.sparsity > uniform.sparsity
    assert found.ratios["2.weight"] > found.ratios["0.weight"]
    found = searched(along="ranked", most=0.5)
    assert len(set(found.ratios.values())) == 3
    assert found.ratios == pytest.approx(bound().ranked(found.sparsity))
    found = searched(along=lambda place: {"2.weight": 0.9 * place})
    assert found.ratios == bound().rounded({"2.weight": 0.9})


@pytest.mark.parametrize("prune", [Channels(), own()], ids=["channels", "function"])
def test_other_ways_to_prune(prune: Any) -> None:
    metric = by_width if isinstance(prune, Channels) else by_zeros
    found = searched(metric, 0.3, prune=prune)
    assert found.metric == metric(found.model) >= 0.7
    assert 0.3 < found.sparsity < 0.9
    recipe = found.recipe()
    assert st.Recipe.from_text(recipe.to_yaml()) == recipe


def test_it_can_be_read() -> None:
    found = searched()
    assert "% sparse, metric" in str(found) and "2.weight" in str(found)
    data = json.loads(json.dumps(found.to_dict()))
    assert data["ratios"] == found.ratios and data["tolerance"] == 0.25
    assert [rule.match for rule in found.recipe().rules] == list(NAMES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": -0.1}, "tolerance=-0.1 must be 0 or more"),
        ({"tolerance": float("nan")}, "tolerance=nan"),
        ({"most": 1.0}, "most=1.0"),
        ({"resolution": 0.0}, "resolution=0.0"),
        ({"repeats": 0}, "repeats=0"),
        ({"along": "steepest"}, "along='steepest' is not one of"),
        ({"along": lambda place: {"0.wieght": place}}, "no such knob"),
        ({"along": lambda place: {"0.weight": 1.0}}, "must be in"),
        ({"along": "ranked", "prune": own()}, "have no scores that layers could compete by"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    metric = Counting()
    with pytest.raises(ValueError, match=message):
        searched(metric, **options)
    assert metric.calls == 0  # found out before anything is evaluated
