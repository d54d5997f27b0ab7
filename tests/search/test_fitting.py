"""Ratios made to meet a target: it holds, and no knob could keep more."""

from __future__ import annotations

from typing import Any

import pytest
from channels_networks import Residual, Stack, images
from hypothesis import assume, given, settings
from hypothesis import strategies as some
from runs import SmallNet, batch
from searches import NAMES, bound, inputs, net, own, set_zeros

import sparsetrain as st
from sparsetrain.search import Channels, CostOf, Knobs, Weights, fitted
from sparsetrain.search.knobs import Ratios


class Limited(CostOf):
    """Gives up where a search goes on for ever."""

    asked = 0

    def holds(self, ratios: Ratios) -> bool:
        self.asked += 1
        assert self.asked < 1000
        return super().holds(ratios)


def pruned() -> SmallNet:
    model = SmallNet()
    st.prune(model, "magnitude", 0.4).apply()
    return model


CASES: dict[str, Any] = {
    "weights": lambda: Weights().bind(SmallNet(), batch(0)[0]),
    "rows": lambda: Weights(structure="constant_fan_in").bind(SmallNet(), batch(0)[0]),
    "zeros": lambda: Weights().bind(pruned(), batch(0)[0]),
    "channels": lambda: Channels().bind(Residual(), images()),
    "rounded": lambda: Channels(round_to=4).bind(Residual(), images()),
    "floor": lambda: Channels(floor=0.3).bind(Residual(), images()),
    "branches": lambda: Channels().bind(Stack([("branches", 4), ("shortcut", 4)], False), images()),
}
targets = some.one_of(
    some.builds(st.Flops, some.floats(0.2, 1.0)),
    some.builds(st.CompressionRate, some.floats(1.0, 4.0)),
)


def one_step_more(knobs: Knobs, ratios: Ratios) -> list[dict[str, float]]:
    """Every network of which one knob with coarse steps keeps one more."""
    real = knobs.rounded(ratios)
    steps = {knob.name: knob.step for knob in knobs.knobs if knob.step > 0.002}
    more = [{**real, name: max(real[name] - step, 0.0)} for name, step in steps.items()]
    return [other for other in more if knobs.rounded(other) != real]


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=10)
@given(target=targets, data=some.data())
def test_a_target_holds_and_is_used_up(
    case: str, target: st.CostTarget, data: some.DataObject
) -> None:
    knobs = CASES[case]()
    cost = Limited(target, knobs)
    asked = {name: data.draw(some.floats(0, 0.95), label=name) for name in knobs.names}
    try:
        found = fitted(asked, cost)
    except ValueError:
        assert not cost.holds(knobs.uniform(0.95))
        assume(False)
    assert cost(found) <= cost.allowed * (1 + 1e-9)
    assert all(0 <= ratio <= 0.95 for ratio in found.values())
    if cost.holds({}):
        assert not any(found.values())
    else:
        assert not any(cost.holds(more) for more in one_step_more(knobs, found))


@settings(max_examples=20)
@given(asked=some.tuples(*(some.floats(0.1, 0.9) for _ in NAMES)), share=some.floats(0.25, 0.95))
def test_by_one_factor(asked: tuple[float, ...], share: float) -> None:
    """Where any share will do, ratios keep their proportions up to what was asked for."""
    cost = CostOf(st.Flops(share), own().bind(net(), inputs()))
    wanted = dict(zip(NAMES, asked, strict=True))
    found = fitted(wanted, cost)
    assert cost.holds(found)
    factors = [found[name] / wanted[name] for name in NAMES]
    if max(factors) <= 1:
        assert max(factors) == pytest.approx(min(factors))
        assert not cost.holds({name: ratio * (1 - 1e-5) for name, ratio in found.items()})
    else:  # all of what was asked for is not enough: the way that is left to `most`, by a share
        assert not cost.holds(wanted)
        ways = [(found[name] - wanted[name]) / (0.95 - wanted[name]) for name in NAMES]
        assert max(ways) == pytest.approx(min(ways))


def test_zeros_that_are_there_do_not_hold_it_up() -> None:
    """A layer that cannot keep more is left alone."""
    model = net()
    set_zeros(model, {"0.weight": 0.5})
    knobs = Weights().bind(model, inputs())
    cost = Limited(st.CompressionRate(2), knobs)
    found = fitted(knobs.uniform(0.5), cost)
    assert cost(found) == cost.allowed // 1
    assert knobs.rounded(found)["0.weight"] >= 0.5


def test_what_cannot_be_met() -> None:
    cost = CostOf(st.CompressionRate(20), bound())
    message = (
        "target 'compression_rate' allows 6.55 numbers, and with all that may go there are still 22"
    )
    with pytest.raises(ValueError, match=message):
        fitted({}, cost)
    cost = CostOf(st.Flops(0.04), bound())
    with pytest.raises(ValueError, match="ask for more than that, or let more go"):
        fitted({}, cost)
    assert cost.holds(fitted({}, cost, most=0.97))
