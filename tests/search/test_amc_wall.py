from __future__ import annotations

import math
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from channels_networks import images, stacks
from hypothesis import given, reject, settings
from hypothesis import strategies as some
from torch import nn

from sparsetrain.cost.targets import CompressionRate, CostTarget, Energy, Flops, Parameters
from sparsetrain.search.amc_environment import AmcEnvironment
from sparsetrain.search.channels import Channels
from sparsetrain.search.knobs import CostOf, Knobs, Pruning
from sparsetrain.search.weights import Weights


def keep(share: float) -> np.ndarray:
    return np.array([share], np.float32)


TARGETS = some.one_of(
    some.builds(Flops, some.floats(0.03, 1.0)),
    some.builds(Energy, some.floats(0.2, 1.0)),
    some.builds(Parameters, some.floats(0.2, 1.0)),
    some.builds(CompressionRate, some.floats(1.0, 5.0)),
)
PRUNINGS = some.one_of(
    some.builds(Weights),
    some.builds(Channels, floor=some.sampled_from([0.0, 0.4]), round_to=some.sampled_from([1, 4])),
)


@settings(max_examples=40, deadline=None)
@given(stacks, PRUNINGS, TARGETS, some.sampled_from([0.05, 0.2, 0.5]), some.data())
def test_the_budget_always_holds_and_no_action_changes_without_need(
    model: nn.Module, pruning: Pruning, target: CostTarget, lower: float, data: some.DataObject
) -> None:
    try:
        knobs = pruning.bind(model, images())
    except ValueError:  # nothing can go
        reject()
    cost = CostOf(target, knobs)
    try:
        env = AmcEnvironment(knobs, lambda network: 0.0, target=target, lower=lower)
    except ValueError:
        assert not cost.holds(knobs.uniform(1 - lower))
        return
    env.reset(seed=0)
    ratios = knobs.uniform(1 - lower)
    for name in knobs.names:
        share = data.draw(some.floats(0, 1, width=32))
        asked = 1 - max(share, lower)
        *_, info = env.step(keep(share))
        given = info["ratios"][name]
        if cost.holds({**ratios, name: asked}):
            assert given == asked
        else:
            assert asked < given <= 1 - lower
        ratios[name] = given
    assert info["ratios"] == ratios
    spent = target.of_model(knobs.network(ratios), images())
    assert target.holds(spent, target.allowed(target.whole(model, images())))


@cache
def wide() -> Knobs:
    """Widths at which a share of whole channels is not exact in floats."""
    layers: list[nn.Module] = [nn.Linear(30, 23), nn.ReLU(), nn.Linear(23, 26), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(26, 22), nn.ReLU(), nn.Linear(22, 5))
    return Channels().bind(model, torch.randn(2, 30))


@settings(max_examples=40, deadline=None)
@given(some.floats(0.13, 0.9), some.lists(some.floats(0.2, 1), min_size=3, max_size=3))
def test_the_wall_is_where_trying_every_channel_finds_it(share: float, shares: list[float]) -> None:
    knobs = wide()
    env = AmcEnvironment(knobs, lambda network: 0.0, target=Flops(share))
    uses = [(30, 23), (23, 26), (26, 22), (22, 5)]
    allowed = share * 2 * sum(a * b for a, b in uses)
    least = [math.ceil(0.2 * width) for width in (23, 26, 22)]

    def flops(widths: list[int]) -> int:
        sizes = [30, *widths, 5]
        return 2 * sum(a * b for a, b in pairwise(sizes))

    env.reset(seed=0)
    kept: list[int] = []
    for place, (width, wanted) in enumerate(zip((23, 26, 22), shares, strict=True)):
        *_, info = env.step(keep(wanted))
        most = width - math.floor((1 - max(np.float32(wanted), 0.2)) * width)
        options = [
            count
            for count in range(least[place], most + 1)
            if flops([*kept, count, *least[place + 1 :]]) <= allowed
        ]
        kept.append(max(options))
        ratio = knobs.rounded(info["ratios"])[knobs.names[place]]
        assert round((1 - ratio) * width) == kept[-1]
