"""The metric when one layer is pruned, and the recipe that follows from it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from channels_networks import Residual, images
from hypothesis import given, settings
from hypothesis import strategies as some
from runs import SmallNet, batch
from searches import NAMES, PRICES, Counting, bound, by_width, by_zeros, inputs, net, own, zeros
from torch import nn

import sparsetrain as st
from sparsetrain.search import Channels, CostOf, Sensitivity, Weights, recipe_of, sensitivity

QUARTERS = (0.25, 0.5, 0.75)


def measured(**options: Any) -> Sensitivity:
    options = {"ratios": QUARTERS, "example_inputs": inputs(), **options}
    return sensitivity(net(), options.pop("evaluate", by_zeros), **options)


def test_each_knob_is_turned_alone() -> None:
    seen: list[dict[str, float]] = []

    def metric(model: nn.Module) -> float:
        seen.append(zeros(model))
        return by_zeros(model)

    found = measured(evaluate=metric)
    alone = [{name: ratio} for name in NAMES for ratio in QUARTERS]
    expected = [{}, *alone]
    real = {"4.weight": {0.25: 4 / 18, 0.5: 0.5, 0.75: 14 / 18}}  # 18 weights, in whole ones
    for zeros_of, asked in zip(seen, expected, strict=True):
        for name, share in zeros_of.items():
            ratio = asked.get(name, 0.0)
            assert share == pytest.approx(real.get(name, {}).get(ratio, ratio))
    assert found.evaluations == len(expected) and found.baseline == 1
    assert found.metrics["0.weight"] == pytest.approx([1 - 0.4 * r**2 for r in QUARTERS])
    assert found.drops["2.weight"] == pytest.approx([0.1 * r**2 for r in QUARTERS])


def test_coupled_layers_share_a_knob() -> None:
    """A shortcut joins the stem with the last layer of the block."""
    seen: list[tuple[int, ...]] = []

    def metric(model: Any) -> float:
        layers = model.stem, model.inner, model.depthwise, model.grouped, model.last
        seen.append(tuple(layer.out_channels for layer in layers))
        return 1.0

    found = sensitivity(Residual(), metric, [0.5], prune=Channels(), example_inputs=images())
    assert list(found.metrics) == ["stem", "inner", "grouped"]
    assert seen == [(8, 12, 12, 12, 8), (4, 12, 12, 12, 4), (8, 6, 6, 12, 8), (8, 12, 12, 6, 8)]
    tied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    assert list(sensitivity(tied, zeros_in_all, [0.5]).metrics) == ["0.weight"]


def zeros_in_all(model: nn.Module) -> float:
    return -float(sum(zeros(model).values()))


@given(
    metrics=some.lists(some.floats(-1, 1), min_size=3, max_size=3),
    ratio=some.floats(0, 0.75),
    more=some.floats(0, 0.75),
)
def test_drops_of_a_noisy_metric(metrics: list[float], ratio: float, more: float) -> None:
    """Monotone, at least 0, in proportion between what was measured."""
    knobs = own("0.weight").bind(net(), None)
    found = Sensitivity(knobs, QUARTERS, 0.0, {"0.weight": tuple(metrics)}, 0)
    low, high = sorted((ratio, more))
    assert 0 <= found.drop("0.weight", low) <= found.drop("0.weight", high) + 1e-12
    curve = [max(0.0, *(-metric for metric in metrics[:number])) for number in range(1, 4)]
    by_hand = np.interp(knobs.rounded({"0.weight": ratio})["0.weight"], (0, *QUARTERS), (0, *curve))
    assert found.drop("0.weight", ratio) == pytest.approx(by_hand)
    assert found.drop("0.weight", 0.76) == float("inf")
    # The largest ratio of a drop is the other way round.
    allowed = found.drop("0.weight", ratio)
    largest = found.suggest(drop=allowed)["0.weight"]
    assert largest >= ratio - 1e-6
    assert found.drop("0.weight", largest) <= allowed + 1e-6


def test_drops_count_from_where_channels_go() -> None:
    """Six channels: at a tenth none of them goes, and at a third two."""
    found = sensitivity(
        net(), by_width, [0.1, 0.36, 0.4], prune=Channels(), example_inputs=inputs()
    )
    assert found.metrics["2"] == pytest.approx([1, 1 - 0.1 / 3, 1 - 0.1 / 3])
    for ratio, gone in ((0.1, 0), (0.16, 0), (0.17, 1), (0.34, 2), (0.4, 2)):
        assert found.drop("2", ratio) == pytest.approx(0.1 * gone / 6)


def test_a_suggestion_by_hand() -> None:
    """The drop of 0.4 s^2 is 0.1 at a half; that of 0.1 s^2 at the largest is 0.05625."""
    found = measured()
    assert found.suggest(drop=0.1) == pytest.approx(
        {
            "0.weight": 0.5,
            "2.weight": 0.75,
            # Between 4/18 and 9/18, whose drops are 0.5 (4/18)^2 and 0.125.
            "4.weight": 4 / 18
            + (0.1 - 0.5 * (4 / 18) ** 2) / (0.125 - 0.5 * (4 / 18) ** 2) * 5 / 18,
        }
    )
    # Of 18 weights 14 are the nearest to three quarters: that is no more than was measured.
    assert found.drop("4.weight", 14 / 18) == pytest.approx(0.5 * (14 / 18) ** 2)
    assert found.drop("4.weight", 15 / 18) == float("inf")
    assert found.suggest(drop=0.0) == dict.fromkeys(NAMES, 0.0)
    assert found.suggest(drop=9.0) == pytest.approx(
        {**dict.fromkeys(NAMES, 0.75), "4.weight": 14 / 18}
    )


@settings(max_examples=25)
@given(share=some.floats(0.3, 1.0))
def test_sensitive_layers_prune_less(share: float) -> None:
    found = SENSITIVITY
    cost = CostOf(st.Flops(share), found.knobs)
    ratios = found.suggest(st.Flops(share))
    assert cost.holds(ratios)
    # In the order of the prices, as coarse as whole weights are.
    assert ratios["2.weight"] >= ratios["0.weight"] - 1 / 18 >= ratios["4.weight"] - 3 / 18
    # One threshold: who drops less than others has gone as far as was measured.
    drops = {name: found.drop(name, ratio) for name, ratio in ratios.items()}
    for name, drop in drops.items():
        assert drop >= max(drops.values()) - 0.06 or ratios[name] >= 0.69
    assert found.suggest({"kind": "flops", "share": share}) == ratios


SENSITIVITY = measured()


@pytest.mark.parametrize("name", ["suggest", "optimise"])
def test_layers_without_a_drop_go_first(name: str) -> None:
    def metric(model: nn.Module) -> float:
        return -zeros(model)["4.weight"]

    found = measured(evaluate=metric)
    ratios = getattr(found, name)(st.Flops(0.5))
    assert found.knobs.rounded(ratios)["4.weight"] == 0
    assert CostOf(st.Flops(0.5), found.knobs).holds(ratios)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda s: s.suggest(), "either a target or a drop"),
        (lambda s: s.suggest(st.Flops(0.5), drop=0.1), "either a target or a drop"),
        (lambda s: s.suggest(drop=-0.1), "drop=-0.1 must be 0 or more"),
        (lambda s: s.suggest(st.Flops(0.1)), "with all that may go there are still 56"),
        (lambda s: s.optimise(st.Flops(0.1)), "measure the sensitivity to larger ratios"),
        (lambda s: measured(ratios=[]), r"ratios=\[\] must be shares"),
        (lambda s: measured(ratios=[0.5, 1.0]), r"must be shares to remove, in \(0, 1\)"),
    ],
)
def test_bad_arguments(ask: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ask(SENSITIVITY)


WEIGHTS = {
    "magnitude": Weights(),
    "random": Weights("random", seed=3),
    "constant fan-in": Weights(structure="constant_fan_in"),
    "some layers": Weights(match=["conv", "hidden"]),
    "taylor": Weights("taylor", calibration=[batch(0)], loss_fn=nn.functional.cross_entropy),
}


@pytest.mark.parametrize("prune", WEIGHTS.values(), ids=WEIGHTS)
def test_a_recipe_in_a_file_makes_the_network(prune: Weights, tmp_path: Any) -> None:
    """Exactly its counts, other weights dense; by magnitude its very masks."""
    model = SmallNet()
    found = sensitivity(model, zeros_in_all, QUARTERS, prune=prune, example_inputs=batch(0)[0])
    ratios = found.suggest(st.Flops(0.6))
    recipe = found.recipe(ratios)
    recipe.dump(tmp_path / "recipe.yaml")
    back = st.Recipe.load(tmp_path / "recipe.yaml")
    assert back == recipe
    network = found.knobs.network(ratios)
    optimizer = st.SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, back)
    masks = {name: weight != 0 for name, weight in network.named_parameters() if weight.dim() > 1}
    got = {name: optimizer.masks().get(name, torch.ones_like(mask)) for name, mask in masks.items()}
    assert {n: int(m.sum()) for n, m in got.items()} == {n: int(m.sum()) for n, m in masks.items()}
    if prune.score == "magnitude":
        assert all(mask.equal(got[name]) for name, mask in masks.items())


def test_a_recipe_for_another_policy() -> None:
    ratios = {"0.weight": 0.5, "4.weight": 0.75}
    policy = st.RigL(sparsity=0.1, total_steps=10)
    recipe = st.Recipe.from_text(recipe_of(bound(), ratios, policy).to_yaml())
    model = net()
    optimizer = st.SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, recipe)
    counts = {name: int(mask.sum()) for name, mask in optimizer.masks().items()}
    assert counts == {"0.weight": 24, "4.weight": 4}
    assert isinstance(recipe.policy, st.RigL)


def odd_widths() -> nn.Module:
    """Of which shares are no floats: 1 - 8/10 of ten channels is a little less than two."""
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 11), nn.Linear(11, 3))


@pytest.mark.parametrize("network", ["residual", "odd"])
@settings(max_examples=10)
@given(data=some.data())
def test_rules_for_channels(network: str, data: some.DataObject) -> None:
    model, x = (Residual(), images()) if network == "residual" else (odd_widths(), inputs())
    knobs = Channels().bind(model, x)
    ratios = {name: data.draw(some.floats(0, 0.95)) for name in knobs.names}
    recipe = st.Recipe.from_text(recipe_of(knobs, ratios).to_yaml())
    result = st.channels.prune(model, x, rules=recipe.rules, measure_latency=False)
    network = knobs.network(ratios).state_dict()
    assert all(map(torch.equal, result.model.state_dict().values(), network.values()))


def test_it_can_be_read() -> None:
    found = SENSITIVITY
    text = str(found)
    assert "2.weight" in text and "25%" in text
    assert f"{1 - PRICES['0.weight'] / 4:.4f}" in text
    assert json.loads(json.dumps(found.to_dict()))["metrics"]["0.weight"][1] == 0.9


def test_it_goes_on_where_it_was_stopped(tmp_path: Any) -> None:
    metric = Counting()
    metric.stop_at = 4
    with pytest.raises(KeyboardInterrupt):
        measured(evaluate=metric, folder=tmp_path)
    metric.stop_at = None
    found = measured(evaluate=metric, folder=tmp_path)
    assert metric.calls == 10 and found.evaluations == 6
    assert found.metrics == SENSITIVITY.metrics
    assert measured(evaluate=metric, folder=tmp_path, progress=True).evaluations == 0
    # The same ratio twice is one ratio.
    assert measured(evaluate=metric, ratios=[0.5, 0.5]).ratios == (0.5,)
