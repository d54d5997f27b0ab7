"""The least loss within a budget, against trying all choices."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from channels_networks import Residual, images
from hypothesis import assume, given
from hypothesis import strategies as some
from searches import PRICES, by_width, by_zeros, inputs, net, zeros
from torch import nn

import sparsetrain as st
from sparsetrain.search import Channels, CostOf, Sensitivity, dynamic_program, sensitivity
from sparsetrain.search.budget import _at_price, _Menu

Table = list[list[float]]


def by_trying_all(losses: Table, costs: Table, budget: float) -> float:
    """The least sum of losses; infinite where nothing fits."""
    best = float("inf")
    for choice in itertools.product(*(range(len(row)) for row in losses)):
        if sum(row[n] for row, n in zip(costs, choice, strict=True)) <= budget + 1e-12:
            best = min(best, sum(row[n] for row, n in zip(losses, choice, strict=True)))
    return best


def tables(numbers: some.SearchStrategy[Any]) -> some.SearchStrategy[tuple[Table, Table]]:
    rows = some.lists(
        some.lists(some.tuples(some.integers(0, 30), numbers), min_size=1, max_size=4),
        min_size=1,
        max_size=4,
    )
    return rows.map(
        lambda rows: tuple([[float(pair[k]) for pair in row] for row in rows] for k in (0, 1))
    )


@given(tables(some.integers(-9, 9)), some.integers(-20, 30))
def test_whole_costs_are_exact_with_a_bin_each(table: Any, budget: int) -> None:
    losses, costs = table
    spare = budget - sum(map(min, costs))
    if spare < 0:
        with pytest.raises(ValueError, match="even the cheapest choices cost more"):
            dynamic_program(losses, costs, budget, bins=100)
        return
    chosen = dynamic_program(losses, costs, budget, bins=max(int(spare), 1))
    assert sum(row[n] for row, n in zip(costs, chosen, strict=True)) <= budget
    loss = sum(row[n] for row, n in zip(losses, chosen, strict=True))
    assert loss == by_trying_all(losses, costs, budget)


@given(tables(some.floats(-5, 5)), some.floats(-10, 20), some.sampled_from([5, 100, 20_000]))
def test_the_budget_holds_and_a_bin_a_row_is_lost_at_most(
    table: Any, budget: float, bins: int
) -> None:
    losses, costs = table
    spare = budget - sum(map(min, costs))
    assume(spare > 1e-9)
    chosen = dynamic_program(losses, costs, budget, bins)
    assert sum(row[n] for row, n in zip(costs, chosen, strict=True)) <= budget + 1e-9
    loss = sum(row[n] for row, n in zip(losses, chosen, strict=True))
    smaller = budget - len(losses) * spare / bins
    assert by_trying_all(losses, costs, budget) <= loss <= by_trying_all(losses, costs, smaller)


def test_what_does_not_fit() -> None:
    infinite = float("inf")
    assert dynamic_program([[infinite, 1.0]], [[0.0, 1.0]], 1.0) == [1]
    with pytest.raises(ValueError, match="no choices of finite loss"):
        dynamic_program([[infinite, 1.0], [1.0]], [[0.0, 2.0], [0.5]], 1.0)
    assert dynamic_program([[5.0, 1.0]], [[2.0, 2.0]], 2.0) == [1]  # nothing to spare


def brute(found: Sensitivity, cost: CostOf, menu: list[list[float]]) -> float:
    """The lowest sum of drops of all combinations of ratios that meet the target."""
    best = float("inf")
    for ratios in itertools.product(*menu):
        asked = dict(zip(found.knobs.names, ratios, strict=True))
        if cost.holds(asked):
            best = min(best, loss(found, asked))
    return best


def loss(found: Sensitivity, ratios: dict[str, float]) -> float:
    return sum(found.drop(name, ratio) for name, ratio in ratios.items())


WEIGHTS = sensitivity(net(), by_zeros, (0.2, 0.4, 0.6, 0.8), example_inputs=inputs())


@pytest.mark.parametrize(
    "target",
    [st.Flops(0.25), st.Flops(0.5), st.Flops(0.75), st.Energy(0.92), st.CompressionRate(2)],
    ids=str,
)
def test_weights_against_all_combinations(target: st.CostTarget) -> None:
    """The search has a finer menu than the one that is tried out here."""
    cost = CostOf(target, WEIGHTS.knobs)
    ratios = WEIGHTS.optimise(target)
    assert cost.holds(ratios)
    menu = [[0.0, 0.1, 0.3, 0.4, 0.5, 0.7, 0.8]] * 3
    assert loss(WEIGHTS, ratios) <= brute(WEIGHTS, cost, menu) + 1e-9
    suggested = WEIGHTS.suggest(target)
    assert loss(WEIGHTS, ratios) <= loss(WEIGHTS, suggested) + 0.02


def by_widths(model: Any) -> float:
    """Wide layers of the middle matter most, and matter more the fewer are left."""
    lost = [1 - model.stem.out_channels / 8, 1 - model.inner.out_channels / 12]
    lost.append(1 - model.grouped.out_channels / 12)
    return 1 - 0.3 * lost[0] ** 2 - 0.6 * lost[1] ** 1.5 - 0.1 * lost[2]


def all_counts(found: Sensitivity) -> list[list[float]]:
    last = found.ratios[-1]
    counts = {knob.name: knob.size for knob in found.knobs.knobs}
    return [[gone / size for gone in range(int(last * size) + 1)] for size in counts.values()]


@pytest.mark.parametrize("share", [0.2, 0.35, 0.5, 0.65, 0.8, 0.95])
@pytest.mark.parametrize("network", ["stack", "residual"])
def test_channels_against_all_combinations(network: str, share: float) -> None:
    """Costs depend on each other; the descent finds the best of all networks here."""
    made: dict[str, Any] = {
        "stack": (net(), by_width, inputs()),
        "residual": (Residual(), by_widths, images()),
    }
    model, metric, x = made[network]
    found = sensitivity(model, metric, prune=Channels(), example_inputs=x)
    cost = CostOf(st.Flops(share), found.knobs)
    ratios = found.optimise(st.Flops(share))
    assert cost.holds(ratios)
    assert loss(found, ratios) == pytest.approx(brute(found, cost, all_counts(found)), abs=1e-9)


@pytest.mark.parametrize("price", [0.0, 1e-6, 1e-4, 1e-3, 1e-2, 1.0])
def test_descent_at_a_price(price: float) -> None:
    """It ends where no single knob can lower the loss plus the price of the cost."""
    found = sensitivity(Residual(), by_widths, prune=Channels(), example_inputs=images())
    menu = _Menu(found, CostOf(st.Flops(0.5), found.knobs))
    choice = _at_price(menu, price)
    best = menu.loss(choice) + price * menu.price(choice)
    for name, options in menu.options.items():
        for number in range(len(options)):
            other = {**choice, name: number}
            assert menu.loss(other) + price * menu.price(other) >= best - 1e-9
    if price in (0.0, 1.0):
        assert choice == (menu.cheapest if price else dict.fromkeys(menu.options, 0))


def test_one_knob_alone() -> None:
    """Between its ratios there is no price at which each of them is the best."""
    model = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 2))

    def metric(model: Any) -> float:
        return -((1 - model[0].out_features / 10) ** 0.5)

    found = sensitivity(model, metric, prune=Channels(), example_inputs=inputs()[:, :4])
    for kept in range(1, 10):
        assert found.knobs.rounded(found.optimise(st.Flops(kept / 10)))["0"] == 1 - kept / 10


def test_sensitive_layers_prune_less() -> None:
    """Of two layers of the same size the one with the lower price."""
    ratios = WEIGHTS.knobs.rounded(WEIGHTS.optimise(st.Flops(0.5)))
    assert PRICES["2.weight"] < PRICES["0.weight"]
    assert ratios["2.weight"] > ratios["0.weight"]
    assert zeros(WEIGHTS.knobs.network(ratios)) == pytest.approx(ratios)
