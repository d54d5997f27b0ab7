"""How many channels go: targets, floors, rules, and what the report measures."""

from __future__ import annotations

import copy
import math
import time
from fractions import Fraction
from typing import Any

import pytest
import torch
from channels_networks import Residual, images, stacks
from hypothesis import assume, given, settings
from hypothesis import strategies as some
from torch import nn

import sparsetrain as st
from sparsetrain.channels.removal import remove
from sparsetrain.channels.result import Sizes


def cost_of(model: nn.Module, counts: dict[str, int], cost: str) -> float:
    smaller = copy.deepcopy(model)
    found = st.channels.couplings(smaller, images())
    gone = {c.name: c.removable(range(c.channels), c.channels - counts[c.name]) for c in found}
    remove(gone, found, None)
    return float(getattr(Sizes.of(smaller, images()), cost))


@settings(max_examples=25, deadline=None)
@given(model=stacks, share=some.floats(0.2, 0.95), cost=some.sampled_from(["flops", "parameters"]))
def test_targets_against_a_scan_of_all_shares(model: nn.Module, share: float, cost: str) -> None:
    found = st.channels.couplings(model, images())
    assume(found)
    allowed = share * getattr(Sizes.of(model, images()), cost)
    steps = {Fraction(gone, c.channels) for c in found for gone in range(c.channels + 1)}
    plans = [
        {c.name: max(c.channels - math.floor(step * c.channels), 1) for c in found}
        for step in sorted(steps)
    ]
    first = next((n for n, p in enumerate(plans) if cost_of(model, p, cost) <= allowed), None)
    options: dict[str, Any] = {cost: share, "measure_latency": False}
    if first is None:
        with pytest.raises(ValueError, match="without all channels that may go"):
            st.channels.prune(model, images(), "l1", **options)
        return
    expected = plans[first]
    for name in expected if first else []:
        more = {**expected, name: plans[first - 1][name]}
        expected = more if cost_of(model, more, cost) <= allowed else expected
    result = st.channels.prune(model, images(), "l1", **options)
    # Two branches side by side keep a channel each, whatever is asked of both together.
    gone = {
        c.name: len(c.removable(range(c.channels), c.channels - expected[c.name])) for c in found
    }
    assert {name: len(result.removed.get(name, [])) for name in gone} == gone


def test_rounding_does_not_cost_more_than_a_step() -> None:
    """Both layers would lose eight channels at the same ratio; the first may keep them."""
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
    model.append(nn.Linear(16, 4))
    x = torch.randn(2, 4)
    result = st.channels.prune(model, x, "l1", parameters=0.6, round_to=8)
    assert result.layers == {"0": (16, 16), "2": (16, 8)}
    assert st.channels.prune(model, x, "l1", parameters=0.5, round_to=8).layers == {
        "0": (16, 8),
        "2": (16, 8),
    }


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
