"""How many channels go: targets, floors, rules, and what the report measures."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch
from channels_networks import Residual, images, stacks
from hypothesis import assume, given, settings
from hypothesis import strategies as some
from torch import nn

import sparsetrain as st


@settings(max_examples=25, deadline=None)
@given(model=stacks, share=some.floats(0.2, 0.95), cost=some.sampled_from(["flops", "parameters"]))
def test_targets_are_kept_and_one_channel_more_would_miss_them(
    model: nn.Module, share: float, cost: str
) -> None:
    assume(st.channels.couplings(model, images()))
    options: dict[str, Any] = {cost: share, "measure_latency": False}
    try:
        result = st.channels.prune(model, images(), "l1", **options)
    except ValueError as error:
        assert "without all channels that may go" in str(error)
        least = st.channels.prune(model, images(), "l1", 0.999, measure_latency=False)
        assert getattr(least.after, cost) > share * getattr(least.before, cost)
        return
    left = getattr(result.after, cost) / getattr(result.before, cost)
    assert left <= share
    # The share that goes is the least: with any smaller one that changes anything it is too much.
    counts = {c.name: c.channels for c in st.channels.couplings(model, images())}
    gone = {n: len(result.removed.get(n, [])) for n in counts}
    ratio = min((gone[n] + 1) / counts[n] for n in counts) - 1e-9
    less = max((gone[n] / counts[n] for n in counts), default=0.0) - 1e-9
    if 0 < less < ratio:
        more = st.channels.prune(model, images(), "l1", less, measure_latency=False)
        assert getattr(more.after, cost) > share * getattr(more.before, cost)


def test_both_targets_hold() -> None:
    result = st.channels.prune(Residual(), images(), "l1", flops=0.7, parameters=0.4)
    assert result.after.flops <= 0.7 * result.before.flops
    assert result.after.parameters <= 0.4 * result.before.parameters


@pytest.mark.parametrize("method", ["thinet", "l1"])
def test_a_target_with_every_kind_of_method(method: str) -> None:
    rules = [{"match": "inner", "dense": True}]  # ThiNet has no way with what follows
    result = st.channels.prune(
        Residual(), images(), method, flops=0.6, rules=rules, calibration=[images(8)]
    )
    assert 0.3 < result.after.flops / result.before.flops <= 0.6


def test_a_target_across_layers_has_a_floor() -> None:
    torch.manual_seed(0)
    model = Residual()
    with torch.no_grad():
        model.inner.weight[1:] *= 1e-3
    options: dict[str, Any] = {"flops": 0.5, "scope": "global"}
    free = st.channels.prune(model, images(), "l1", **options)
    assert free.layers["inner"] == (12, 3)
    kept = st.channels.prune(model, images(), "l1", **options, floor=0.5)
    assert kept.layers["inner"] == (12, 6)
    assert kept.after.flops <= 0.5 * kept.before.flops


def test_what_the_floor_protects_does_not_make_others_go() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([4.0, 3.0, 2.0, 1.0]).view(4, 1).expand(4, 3))
        model[2].weight.copy_(torch.tensor([4.0, 0.1, 0.1, 0.1]).view(4, 1).expand(4, 4))
    x = torch.randn(2, 3)
    assert st.channels.prune(model, x, "l1", 0.5, scope="global").layers == {
        "0": (4, 3),
        "2": (4, 1),
    }
    found = st.channels.prune(model, x, "l1", 0.5, scope="global", floor=0.5)
    assert found.layers == {"0": (4, 2), "2": (4, 2)}
    assert st.channels.prune(model, x, "l1", 0.9, floor=0.5).layers == {"0": (4, 2), "2": (4, 2)}


def test_rules_come_before_the_ratio() -> None:
    rules = [{"match": "stem", "dense": True}, {"regex": "inn", "sparsity": 0.75}]
    result = st.channels.prune(Residual(), images(), "l1", 0.5, rules=rules)
    assert result.layers == {"stem": (8, 8), "inner": (12, 3), "grouped": (12, 6)}
    result = st.channels.prune(Residual(), images(), "l1", flops=0.7, rules=rules)
    assert result.layers["stem"] == (8, 8) and result.layers["inner"] == (12, 3)
    assert result.after.flops <= 0.7 * result.before.flops


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"flops": 0.5, "ratio": 0.5}, "either a ratio or flops"),
        ({"flops": 0.0}, r"flops=0.0 must be the share that may be left, in \(0, 1\]"),
        ({"parameters": 1.5}, "parameters=1.5"),
        ({"flops": 0.001}, "there is still flops=0.0"),
        ({"floor": 1.0}, "floor=1.0"),
        ({"scope": "model"}, "scope='model'"),
        (
            {"rules": [{"match": "head", "dense": True}]},
            r"rule 0 \(match='head'\) speaks of no layer",
        ),
        ({"rules": [{"match": "stem"}]}, "exactly one of 'dense: true'"),
        (
            {"rules": [{"match": "stem", "policy": {"kind": "static", "sparsity": 0.5}}]},
            "channels have no policy",
        ),
        ({"method": "thinet", "scope": "global"}, "goes layer by layer"),
        ({"scope": "global", "rules": [{"match": "stem", "sparsity": 0.1}]}, "has one ratio"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    model = Residual()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        st.channels.prune(model, images(), **arguments)
    torch.testing.assert_close(model.state_dict(), state)


def test_latency_is_measured_in_turn() -> None:
    result = st.channels.prune(Residual(), images(), "l1", 0.5)
    assert result.seconds is not None and min(result.seconds) > 0
    assert "latency" in str(result)
    assert st.channels.prune(Residual(), images(), measure_latency=False).seconds is None
    calls: list[str] = []

    class Slow(nn.Module):
        def __init__(self, name: str, waits: float) -> None:
            super().__init__()
            self.name, self.waits = name, waits

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert not self.training and not torch.is_grad_enabled()
            calls.append(self.name)
            time.sleep(self.waits)
            return x

    slow, fast = Slow("slow", 0.02), Slow("fast", 0.005)
    found = st.cost.latency([slow, fast], torch.ones(1), rounds=3, seconds=0.005)
    assert calls[-6:].count("fast") == 3 and slow.training
    assert found[0] >= 0.02 and 0.005 <= found[1] < found[0]
