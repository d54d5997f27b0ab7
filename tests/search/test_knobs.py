"""Knobs: a ratio for each layer or coupling, and the network that they give."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from channels_networks import Residual, Stack, images
from hypothesis import given, settings
from hypothesis import strategies as some
from runs import SmallNet, batch
from searches import NAMES, SIZES, bound, inputs, net, own, set_zeros, zeros
from torch import nn

import sparsetrain as st
from sparsetrain.cost.layers import LayerUse, layers_used
from sparsetrain.search import ByFunction, Channels, CostOf, Weights, recipe_of
from sparsetrain.search.weights import pruning_of


def branches() -> nn.Module:
    """Two layers side by side, around which there is a shortcut; the second is the weak one."""
    model = Stack([("branches", 4), ("shortcut", 4)], False)
    with torch.no_grad():
        model.blocks[0][0][0].weight.mul_(30)
    return model


WAYS: dict[str, Any] = {
    "weights": (Weights(), SmallNet, batch(0)[0]),
    "rows": (Weights("random", structure="constant_fan_in"), SmallNet, batch(0)[0]),
    "some weights": (Weights(match=["hidden", "head"]), SmallNet, batch(0)[0]),
    "channels": (Channels(), Residual, images()),
    "rounded channels": (Channels(round_to=2, floor=0.25), Residual, images()),
    "branches": (Channels(), branches, images()),
    "function": (own(), net, inputs()),
}


def rough(layers: list[LayerUse]) -> list[LayerUse]:
    return [replace(use, density=round(use.density, 9)) for use in layers]


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=12)
@given(data=some.data())
def test_what_a_network_has_is_known_without_it(way: str, data: some.DataObject) -> None:
    """Its ratios and layers; and equal ratios after rounding are equal networks."""
    pruning, make, x = WAYS[way]
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    knobs = pruning.bind(model, x)
    asked = {name: data.draw(some.floats(0, 0.99), label=name) for name in knobs.names}
    real, network = knobs.rounded(asked), knobs.network(asked)
    assert rough(knobs.layers(asked)) == rough(layers_used(network, x))
    assert list(real) == list(knobs.names) and all(0 <= r < 1 for r in real.values())
    again = knobs.network(real)
    assert all(map(torch.equal, again.state_dict().values(), network.state_dict().values()))
    assert knobs.rounded(real) == pytest.approx(real, abs=1e-12)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


@given(first=some.floats(0, 0.99), last=some.floats(0, 0.99))
def test_weights_by_hand(first: float, last: float) -> None:
    """The smallest go, a whole number of them, but for one of a layer."""
    knobs, model = bound(), net()
    asked = {"0.weight": first, "4.weight": last}
    network = knobs.network(asked)
    counts = {n: max(round((1 - asked.get(n, 0.0)) * size), 1) for n, size in SIZES.items()}
    for name, count in counts.items():
        weight, made = model.get_parameter(name).abs().view(-1), network.get_parameter(name)
        best = set(weight.argsort(descending=True)[:count].tolist())
        assert set(made.view(-1).nonzero().view(-1).tolist()) == best
    assert knobs.rounded(asked) == pytest.approx({n: 1 - counts[n] / s for n, s in SIZES.items()})
    assert knobs.share(asked) == pytest.approx(1 - sum(counts.values()) / sum(SIZES.values()))


def test_zeros_that_are_there() -> None:
    model = net()
    set_zeros(model, {"0.weight": 0.5, "2.weight": 1.0})
    knobs = Weights().bind(model, inputs())
    assert knobs.rounded({}) == pytest.approx({"0.weight": 0.5, "2.weight": 47 / 48, "4.weight": 0})
    assert zeros(knobs.network({"0.weight": 0.25})) == zeros(model)
    assert zeros(knobs.network({"0.weight": 0.75}))["0.weight"] == 0.75
    recipe_of(knobs, knobs.rounded({}))  # no ratio is 1, which no rule takes


@given(share=some.floats(0, 0.999))
def test_one_threshold_for_all_layers(share: float) -> None:
    model = net()
    ranked = bound().ranked(share)
    sizes = [(float(w), n) for n in NAMES for w in model.get_parameter(n).detach().abs().view(-1)]
    kept = max(round((1 - share) * len(sizes)), 3)
    best = [name for _, name in sorted(sizes, reverse=True)[:kept]]
    counts = {name: round((1 - ranked[name]) * size) for name, size in SIZES.items()}
    assert sum(counts.values()) == kept
    if set(best) == set(NAMES):  # else a layer keeps a weight although it is a small one
        assert counts == {name: best.count(name) for name in NAMES}


def test_a_threshold_puts_zeros_that_are_there_first() -> None:
    model = net()
    set_zeros(model, {"2.weight": 0.5})
    knobs = Weights("random").bind(model, inputs())
    ranked = knobs.ranked(24 / 114)  # what is there already
    assert ranked == pytest.approx({"0.weight": 0.0, "2.weight": 0.5, "4.weight": 0.0})
    for knobs in (bound(Channels()), own().bind(model, None)):
        with pytest.raises(ValueError, match="have no scores that layers could compete by"):
            knobs.ranked(0.5)


def test_layers_keep_a_channel_whatever_is_asked() -> None:
    """Two branches side by side have a coupling together, and keep one each."""
    pruning, make, x = WAYS["branches"]
    knobs = pruning.bind(make(), x)
    most = knobs.rounded(knobs.uniform(0.99))
    assert most["blocks.0.0.0"] == 6 / 8
    network = knobs.network(most)
    assert network.blocks[0][0][0].out_channels == network.blocks[0][1][0].out_channels == 1


def test_knobs_say_which_layers_they_turn() -> None:
    tied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
    tied[2].weight = tied[0].weight
    found = Weights().bind(tied, None).knobs
    assert [(knob.name, knob.size, knob.layers) for knob in found] == [
        ("0.weight", 16, ("0", "2")),
        ("3.weight", 8, ("3",)),
    ]
    coupled = {knob.name: set(knob.layers) for knob in Channels().bind(Residual(), images()).knobs}
    assert coupled["stem"] == {"stem", "norm", "inner", "last", "head"}


def test_a_function_of_the_user() -> None:
    seen: list[Mapping[str, float]] = []

    def replaced(model: nn.Module, ratios: Mapping[str, float]) -> nn.Module:
        seen.append(ratios)
        return nn.Sequential()  # which is false

    model = net()
    knobs = ByFunction(replaced, ["0", "4.weight"]).bind(model, None)
    assert [(knob.name, knob.size) for knob in knobs.knobs] == [("0", 56), ("4.weight", 18)]
    made = knobs.network({"0": 0.12345649, "4.weight": 0.9999999})
    assert len(made) == 0
    # What was rounded away cannot make two networks of one.
    assert seen[0] == knobs.rounded(seen[0]) == {"0": 0.123456, "4.weight": 0.999999}
    in_place = own().bind(model, None).network({"4.weight": 0.5})
    assert zeros(in_place) == {"0.weight": 0.0, "2.weight": 0.0, "4.weight": 0.5}
    assert zeros(model)["4.weight"] == 0
    with pytest.raises(TypeError, match="has to return a model or None, not True"):
        ByFunction(lambda model, ratios: True, ["0"]).bind(model, None).network({})


@pytest.mark.parametrize("way", ["weights", "channels", "rounded channels", "branches"])
@pytest.mark.parametrize(
    "target",
    [st.Flops(0.5), st.Energy(0.5), st.CompressionRate(2), st.ModelBytes(10), st.Parameters(0.5)],
    ids=lambda target: target.kind,
)
def test_what_a_network_costs(way: str, target: st.CostTarget) -> None:
    pruning, make, x = WAYS[way]
    model = make()
    knobs = pruning.bind(model, x)
    cost = CostOf(target.model_dump(), knobs)
    assert cost.whole == target.whole(model, x)
    for share in (0.0, 0.3, 0.8):
        asked = knobs.uniform(share)
        assert cost(asked) == pytest.approx(target.of_model(knobs.network(asked), x), rel=1e-9)
        assert cost.holds(asked) == (cost(asked) <= cost.allowed * (1 + 1e-9))


def test_what_evaluations_depend_on() -> None:
    same = bound().fingerprint()
    assert bound().fingerprint() == same == json.loads(json.dumps(same))
    others: list[Any] = [
        bound(seed=1),
        bound("random"),
        bound(Weights(seed=1)),
        bound(Weights(structure="constant_fan_in")),
        bound(Weights(match="2")),
        bound(Channels()),
        bound(Channels("l2")),
        bound(Channels(round_to=2)),
        own().bind(net(), None),
    ]
    prints = [json.dumps(knobs.fingerprint()) for knobs in others]
    assert len({*prints, json.dumps(same)}) == len(others) + 1
    with_norm = SmallNet()
    first = Weights().bind(with_norm, None).fingerprint()
    with_norm.norm.running_mean[0] = 0.5
    assert Weights().bind(with_norm, None).fingerprint() != first


def test_a_function_alone_has_a_ratio_for_each_weight() -> None:
    knobs = pruning_of(set_zeros).bind(net(), None)
    assert knobs.names == ("0.weight", "2.weight", "4.weight")
    assert zeros(knobs.network({"2.weight": 0.5}))["2.weight"] == 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bound().network({"0.weihgt": 0.5}), "no such knob .did you mean '0.weight'"),
        (lambda: bound().network({"0.weight": 1.0}), r"ratio 1.0 of '0.weight' must be in \[0, 1"),
        (lambda: bound().rounded({"0.weight": -0.1}), "ratio -0.1"),
        (lambda: bound(Weights(structure="2:4")), "sets the sparsity itself"),
        (lambda: bound("synflow"), "does not score single weights in one round"),
        (lambda: bound("activation_variance"), "does not score single weights in one round"),
        (lambda: bound(Weights(match="nothing")), "names nothing in the model"),
        (lambda: bound("magnitud"), "did you mean 'magnitude'"),
        (lambda: Channels().bind(net(), None), "give example_inputs"),
        (lambda: bound(Channels(floor=1.0)), "floor=1.0"),
        (lambda: bound(Channels(round_to=0)), "round_to=0"),
        (lambda: own("0.wieght").bind(net(), None), "no layer or weight is called '0.wieght'"),
        (lambda: own("0", "0").bind(net(), None), "each another one: 0, 0"),
        (lambda: ByFunction(set_zeros, []).bind(net(), None), "knobs need names"),
        (lambda: CostOf(st.Flops(0.5), own().bind(net(), None)), "give example_inputs"),
        (lambda: own().bind(net(), None).layers({}), "give example_inputs"),
    ],
)
def test_bad_arguments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_what_prunes_nothing() -> None:
    with pytest.raises(TypeError, match=r"prune must be st.search.Weights"):
        st.search.sensitivity(net(), zeros, prune=0.5)  # type: ignore[arg-type]
