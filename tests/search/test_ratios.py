"""Ratios of all layers at once, by each method."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from searches import (
    NAMES,
    Counting,
    bound,
    by_width,
    by_zeros,
    closeness,
    inputs,
    net,
    own,
    set_zeros,
)

import sparsetrain as st
from sparsetrain.search import Channels, CostOf, Point, SearchResult, fitted, ratios
from sparsetrain.search.points import front

HALF = st.Flops(0.5)
WITH_TARGET = ["evolution", "tpe", "cma_es", "random"]


def searched(metric: Any = by_zeros, **options: Any) -> SearchResult:
    given = {"example_inputs": inputs(), "trials": 12, "population": 4, **options}
    return ratios(net(), metric, **given)


def test_a_grid_is_all_combinations() -> None:
    choices = [0.5, 0.0, 0.75, 0.5]
    metric = Counting()
    found = searched(metric, method="grid", choices=choices)
    real = bound().rounded
    expected = [
        real(dict(zip(NAMES, values, strict=True)))
        for values in itertools.product((0.0, 0.5, 0.75), repeat=3)
    ]
    assert [point.ratios for point in found.points] == expected  # without any start between them
    assert metric.calls == found.evaluations == 27
    for point in found.points:
        assert point.metric == by_zeros(found.network(point))
        assert point.cost == CostOf(st.Flops(1), found.knobs)(point.ratios) / (2 * 114)


def test_a_grid_within_a_target() -> None:
    found = searched(method="grid", choices=[0.2, 0.8], target=HALF)
    cost = CostOf(HALF, found.knobs)
    for values in itertools.product((0.2, 0.8), repeat=3):
        asked = fitted(dict(zip(NAMES, values, strict=True)), cost)
        assert found.knobs.rounded(asked) in [point.ratios for point in found.points]
    # The uniform ones are the same network.
    assert len(found.points) == 7


@pytest.mark.parametrize("method", WITH_TARGET)
@pytest.mark.parametrize("prune", ["magnitude", Channels(), own()], ids=["w", "c", "f"])
def test_a_target_holds_for_every_point(method: Any, prune: Any) -> None:
    """And the best is no worse than the same ratio everywhere."""
    metric = by_width if isinstance(prune, Channels) else by_zeros
    found = searched(metric, prune=prune, method=method, target=st.Flops(0.6))
    cost = CostOf(st.Flops(0.6), found.knobs)
    uniform = fitted(found.knobs.uniform(0.5), cost)
    assert found.points[0].ratios == found.knobs.rounded(uniform)
    assert found.best.metric >= metric(found.knobs.network(uniform))
    for point in found.points:
        assert point.cost <= 0.6 * (1 + 1e-9)
        assert point.cost == pytest.approx(
            st.Flops(1).of_model(found.network(point), inputs()) / cost.whole
        )
    assert len({str(point.ratios) for point in found.points}) == len(found.points)


@pytest.mark.parametrize("method", ["evolution", "tpe", "random"])
def test_without_a_target_there_is_a_front(method: Any) -> None:
    found = searched(closeness, method=method, cost={"kind": "compression_rate", "rate": 1})
    for first, ratio in zip(found.points, (0.3, 0.5, 0.7), strict=False):
        assert first.ratios == found.knobs.rounded(found.knobs.uniform(ratio))

    def beaten(point: Point) -> bool:
        return any(
            other.metric >= point.metric
            and other.cost <= point.cost
            and (other.metric, other.cost) != (point.metric, point.cost)
            for other in found.points
        )

    best = [point for point in found.points if not beaten(point)]
    assert {(p.cost, p.metric) for p in best} == {(p.cost, p.metric) for p in found.front}
    costs = [point.cost for point in found.front]
    assert costs == sorted(set(costs))
    for point in found.front:
        recipe = found.recipe(point)
        assert st.Recipe.from_text(recipe.to_yaml()) == recipe
        shares = [rule.sparsity or 0.0 for rule in recipe.rules]
        assert shares == list(point.ratios.values())


def test_a_front_by_hand() -> None:
    def points(*pairs: tuple[float, float]) -> list[Point]:
        return [Point({}, metric, cost, 0.0) for metric, cost in pairs]

    given = points((0.5, 3), (0.7, 2), (0.7, 2), (0.6, 2), (0.9, 4), (0.7, 5), (0.1, 1))
    assert front(given) == tuple(points((0.1, 1), (0.7, 2), (0.9, 4)))
    assert front([]) == ()
    found = SearchResult("grid", bound(), HALF, tuple(points((0.9, 4), (0.9, 3), (0.1, 1))), 3)
    assert (found.best.metric, found.best.cost) == (0.9, 3)


@pytest.mark.parametrize("method", ["evolution", "tpe", "cma_es", "random", "grid"])
@pytest.mark.parametrize("stop", [1, 9])
def test_resumed_is_as_uninterrupted(tmp_path: Path, method: Any, stop: int) -> None:
    """The same points, and no network is evaluated twice, not even the one that was cut off."""
    options: dict[str, Any] = {"method": method, "target": HALF, "trials": 16}
    if method == "grid":
        options["choices"] = [0.1, 0.5, 0.9]
    whole, metric = Counting(closeness), Counting(closeness)
    expected = searched(whole, **options)
    metric.stop_at = stop
    with pytest.raises(KeyboardInterrupt):
        searched(metric, folder=tmp_path, **options)
    metric.stop_at = None
    found = searched(metric, folder=tmp_path, **options)
    assert [(p.ratios, p.metric, p.cost) for p in found.points] == [
        (p.ratios, p.metric, p.cost) for p in expected.points
    ]
    assert metric.calls == whole.calls == expected.evaluations == found.evaluations + stop
    again = searched(metric, folder=tmp_path, progress=True, **options)
    assert again.evaluations == 0 and again.points == found.points


@pytest.mark.parametrize("method", ["evolution", "tpe"])
def test_seeds_and_choices(method: Any) -> None:
    options: dict[str, Any] = {"method": method, "choices": [0.0, 0.25, 0.5, 0.75], "trials": 20}
    first, same, other = (searched(seed=seed, **options) for seed in (0, 0, 1))
    assert [p.ratios for p in first.points] == [p.ratios for p in same.points]
    assert [p.ratios for p in first.points] != [p.ratios for p in other.points]
    allowed = {bound().rounded({name: r})[name] for name in NAMES for r in options["choices"]}
    assert {ratio for p in first.points for ratio in p.ratios.values()} <= allowed


@pytest.mark.parametrize("method", ["evolution", "tpe", "cma_es"])
def test_searches_find_better_than_uniform(method: Any) -> None:
    """The middle layer may go for a quarter of the price of the first."""
    found = searched(method=method, target=HALF, trials=40, population=5)
    assert found.best.metric > found.points[0].metric + 0.01
    assert found.best.ratios["2.weight"] > found.best.ratios["0.weight"]
    # It learns on the way.
    metrics = [point.metric for point in found.points]
    assert fmean(metrics[-10:]) > fmean(metrics[1:12]) + 0.05


def test_starts_are_tried_first() -> None:
    start = [{"2.weight": 0.9}, {"0.weight": 0.5, "4.weight": 0.5}]
    found = searched(start=start, trials=5)
    real = [found.knobs.rounded(asked) for asked in start]
    assert [point.ratios for point in found.points[3:5]] == real
    found = searched(start=start, trials=3, target=HALF)
    cost = CostOf(HALF, found.knobs)
    fits = [found.knobs.rounded(fitted(asked, cost)) for asked in start]
    assert [point.ratios for point in found.points[1:3]] == fits


def test_a_compression_rate_needs_no_inputs() -> None:
    rate = st.CompressionRate(2)
    for prune in ("magnitude", own()):
        found = ratios(net(), by_zeros, prune=prune, target=rate, trials=4)
        for point in found.points:
            network = found.network(point)
            assert rate.of_model(network, None) <= 131 / 2
            assert point.cost == rate.of_model(network, None) / 131


def test_a_network_that_is_sparse_already() -> None:
    model = net()
    set_zeros(model, {"0.weight": 0.5, "2.weight": 0.25})
    found = ratios(model, by_zeros, target=st.CompressionRate(2), trials=4)
    for point in found.points:
        assert point.ratios["0.weight"] >= 0.5 and point.ratios["2.weight"] >= 0.25


def test_it_can_be_read() -> None:
    found = searched(method="grid", choices=[0.0, 0.5])
    assert "grid: the front of 8 networks" in str(found)
    assert "flops" in str(found) and "2.weight" in str(found)
    data = json.loads(json.dumps(found.to_dict()))
    assert data["evaluations"] == 8 and data["points"][0]["metric"] == 1.0
    assert found.seconds == pytest.approx(sum(point.seconds for point in found.points))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "anneal"}, "method='anneal' is not one of"),
        ({"method": "grid"}, "needs choices"),
        ({"choices": []}, "choices one ratio or more"),
        ({"method": "cma_es"}, "needs a target, and no choices"),
        ({"method": "cma_es", "target": HALF, "choices": [0.5]}, "needs a target, and no choices"),
        ({"target": HALF, "cost": HALF}, "either a target or a cost"),
        ({"most": 1.0}, "most=1.0"),
        ({"choices": [0.5, 0.99]}, "in .0, most"),
        ({"trials": 0}, "trials=0"),
        ({"start": [{"0.wieght": 0.5}]}, "no such knob"),
        ({"target": st.Flops(0.01)}, "with all that may go there are still"),
        ({"example_inputs": None}, "give example_inputs"),
        ({"target": {"kind": "flop", "share": 0.5}}, "did you mean 'flops'"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    metric = Counting()
    with pytest.raises(ValueError, match=message):
        searched(metric, **options)
    assert metric.calls == 0
