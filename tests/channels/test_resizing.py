"""Layers of a smaller network without building it: exactly those of the network that is built."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from channels_networks import NETWORKS, Stack, Stream, Transformer, images, stacks
from hypothesis import assume, given, settings
from hypothesis import strategies as some
from torch import Tensor, nn

import sparsetrain as st
from sparsetrain.channels.coupling import Coupling
from sparsetrain.channels.removal import remove
from sparsetrain.channels.resizing import resized
from sparsetrain.cost.layers import LayerUse, layers_used


class Twice(nn.Module):
    """A layer that runs twice, and two layers that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Linear(5, 6), nn.Linear(6, 6)
        self.one, self.other = nn.Linear(6, 4), nn.Linear(6, 4)
        self.other.weight = self.one.weight
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.again(torch.relu(self.again(x))))
        return self.head(torch.relu(self.one(x)) + torch.relu(self.other(x)))


def grouped() -> nn.Module:
    """Groups of convolutions and of a norm, all of which lose the same number."""
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1),
        nn.GroupNorm(3, 12),
        nn.ReLU(),
        nn.Conv2d(12, 8, 3, groups=2),
        nn.ReLU(),
        nn.Conv2d(8, 8, 1, groups=4),
        nn.Flatten(),
        nn.Linear(8 * 36, 3),
    )


def tokens() -> Tensor:
    return torch.arange(15).view(3, 5) % 11


CASES: dict[str, tuple[Any, Any]] = {
    **NETWORKS,
    "stream": (Stream, tokens),
    "heads": (Transformer, tokens),
    "fused heads": (lambda: Transformer("fused"), tokens),
    "norm of heads": (lambda: Transformer("norm of heads"), tokens),
    "twice": (Twice, lambda: torch.randn(3, 5)),
    "groups": (grouped, images),
    # Which channels go makes a difference: they are of two layers, and none is in both.
    "branches": (lambda: Stack([("branches", 4), ("shortcut", 4)], False), images),
    "flat branches": (lambda: Stack([("branches", 4), ("shortcut", 4)], True), images),
}


def really(
    model: nn.Module, found: Sequence[Coupling], gone: Mapping[str, Sequence[int]], inputs: Any
) -> list[LayerUse]:
    """By building the network."""
    smaller, copied = copy.deepcopy((model, list(found)))
    remove(gone, copied, None)
    return layers_used(smaller, inputs)


def check(model: nn.Module, inputs: Any, data: some.DataObject) -> None:
    found = st.channels.couplings(model, inputs)
    assume(found)
    counts = {c.name: data.draw(some.integers(1, c.channels), label=c.name) for c in found}
    orders = {c.name: data.draw(some.permutations(range(c.channels))) for c in found}
    lost = {c.name: c.removable(orders[c.name], c.channels - counts[c.name]) for c in found}
    layers = layers_used(model, inputs)
    assert resized(layers, found, counts, orders) == really(model, found, lost, inputs)


@settings(max_examples=60)
@given(model=stacks, data=some.data())
def test_random_networks(model: nn.Module, data: some.DataObject) -> None:
    check(model, images(), data)


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=6)
@given(data=some.data())
def test_named_networks(name: str, data: some.DataObject) -> None:
    make, inputs = CASES[name]
    check(make(), inputs(), data)


def one_after_the_other(coupling: Coupling, order: Sequence[int], count: int) -> list[int]:
    left = [{c for c, places in enumerate(side.places) if places} for side in coupling.sides]
    taken: list[int] = []
    for channel in order:
        if len(taken) < count and all(channels != {channel} for channels in left):
            taken.append(channel)
            left = [channels - {channel} for channels in left]
    return sorted(taken)


@settings(max_examples=30)
@given(model=stacks, data=some.data())
def test_channels_that_can_go(model: nn.Module, data: some.DataObject) -> None:
    for coupling in st.channels.couplings(model, images()):
        order = data.draw(some.permutations(range(coupling.channels)))
        count = data.draw(some.integers(0, coupling.channels))
        expected = one_after_the_other(coupling, order, count)
        assert coupling.removable(iter(order), count) == expected


def test_every_named_network_has_couplings() -> None:
    """So that none of them was tested by nothing."""
    for make, inputs in CASES.values():
        assert st.channels.couplings(make(), inputs())


def test_couplings_that_are_left_out_stay() -> None:
    make, inputs = CASES["residual"]
    model, x = make(), inputs()
    found, layers = st.channels.couplings(model, x), layers_used(model, x)
    assert resized(layers, found, {}) == layers
    some_gone = {found[1].name: found[1].channels - 2}
    expected = really(model, found, {found[1].name: [0, 1]}, x)
    assert resized(layers, found, some_gone) == expected


class Uneven(nn.Module):
    """A shortcut around a concatenation: its channels are of a dear layer and of a cheap one."""

    def __init__(self, dear: float, cheap: float) -> None:
        super().__init__()
        self.dear, self.cheap = nn.Conv2d(1, 4, 5, padding=2), nn.Conv2d(1, 4, 1)
        self.inner, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 3)
        with torch.no_grad():
            self.dear.weight.mul_(dear)
            self.cheap.weight.mul_(cheap)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.dear(x), self.cheap(x)], 1)
        return self.head((x + torch.relu(self.inner(x))).mean((2, 3)))


@settings(max_examples=25)
@given(
    dear=some.floats(0.01, 10),
    cheap=some.floats(0.01, 10),
    scope=some.sampled_from(["layer", "global"]),
    share=some.floats(0.4, 0.9),
)
def test_a_target_holds_whichever_channels_go(
    dear: float, cheap: float, scope: Any, share: float
) -> None:
    """After a concatenation it matters which: the branches' channels differ in cost."""
    torch.manual_seed(0)
    model, target = Uneven(dear, cheap), st.Flops(share)
    options: dict[str, Any] = {"scope": scope, "measure_latency": False}
    result = st.channels.prune(model, images(), "l1", target=target, **options)
    assert result.after.flops <= share * result.before.flops


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("channels", [5, 6, 10, 49])
def test_shares_of_counts_are_not_rounded_twice(channels: int, scope: Any) -> None:
    """1 - 4/5 of five channels is a little less than one, as floats go."""
    model = nn.Sequential(nn.Linear(3, channels), nn.ReLU(), nn.Linear(channels, 2))
    x = torch.randn(2, 3)
    for kept in range(max(channels - 7, 1), channels):
        share = 1 - kept / channels
        result = st.channels.prune(model, x, ratio=share, scope=scope, measure_latency=False)
        assert result.layers == {"0": (channels, kept)}
