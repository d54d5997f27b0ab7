from __future__ import annotations

import random
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sparsetrain import search
from sparsetrain.cost.targets import Flops
from sparsetrain.search.amc import AmcResult, amc
from sparsetrain.search.channels import Channels
from sparsetrain.search.knobs import CostOf
from sparsetrain.search.points import Point
from sparsetrain.search.weights import Weights

HARM = {"0": 1.0, "2": 0.02, "4": 0.3}  # of removing the weights of a layer


def network() -> nn.Sequential:
    torch.manual_seed(0)
    sizes = [nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 15), nn.ReLU(), nn.Linear(15, 10)]
    return nn.Sequential(*sizes)


def inputs() -> torch.Tensor:
    return torch.ones(2, 12)


def accuracy(pruned: nn.Module) -> float:
    """Known for any zeros."""
    layers = dict(pruned.named_children())
    gone = {name: float((layers[name].weight == 0).float().mean()) for name in HARM}
    return 1 - sum(harm * gone[name] ** 2 for name, harm in HARM.items()) / 2


def quick(evaluate: Callable[[nn.Module], float] = accuracy, **settings: Any) -> AmcResult:
    given = {"episodes": 14, "warmup": 6, "hidden": (16,), "target": Flops(0.5)}
    return amc(network(), evaluate, example_inputs=inputs(), **{**given, **settings})


def test_it_finds_better_shares_than_uniform_ones() -> None:
    found = quick(episodes=120, warmup=40, batch_size=32, hidden=(64, 64), actor_lr=1e-3)
    cost = CostOf(Flops(0.5), found.knobs)
    ratio = next(r for r in np.arange(0.4, 0.6, 0.001) if cost.holds(found.knobs.uniform(r)))
    uniform = accuracy(found.knobs.network(found.knobs.uniform(ratio)))
    assert found.best.metric > uniform + 0.05
    assert np.mean(found.rewards[-20:]) > np.mean(found.rewards[:40]) + 0.05
    assert np.mean(found.rewards[-20:]) > uniform + 0.05
    assert len(found.rewards) == 120
    assert found.best.metric == max(found.rewards)
    assert accuracy(found.network()) == found.best.metric


def test_the_best_point_is_the_best_rewarded_one() -> None:
    found = quick(
        lambda pruned: 0.5 + accuracy(pruned) / 1000, target=None, reward="error_flops", lower=0.7
    )
    flops = 2 * (12 * 20 + 20 * 15 + 15 * 10)

    def reward(point: Point) -> float:
        return -(1 - point.metric) * float(np.log(point.cost * flops))

    assert found.best == max(found.points, key=reward)
    assert found.best.metric < max(point.metric for point in found.points)
    assert max(found.rewards) == pytest.approx(reward(found.best))
    assert max(max(point.ratios.values()) for point in found.points) < 0.31


@pytest.mark.parametrize("prune", [Weights("random"), Channels(round_to=2, floor=0.3)])
def test_every_network_keeps_within_the_target(prune: Any) -> None:
    seen: list[nn.Module] = []
    found = quick(lambda net: float(len(seen.append(net) or seen)), prune=prune)
    assert len(seen) == found.evaluations == len(found.points)
    assert [point.metric for point in found.points] == [*range(1, len(seen) + 1)]
    target = Flops(0.5)
    allowed = target.allowed(target.whole(network(), inputs()))
    for pruned in seen:
        assert target.holds(target.of_model(pruned, inputs()), allowed)


def plain(result: AmcResult) -> Any:
    points = [(point.ratios, point.metric, point.cost) for point in result.points]
    return points, result.rewards, result.best.ratios


def test_a_search_that_was_killed_goes_on_as_if_it_had_not(tmp_path: Path) -> None:
    calls = 0

    def noisy(pruned: nn.Module) -> float:
        nonlocal calls
        calls += 1
        if calls == dies_at:
            raise KeyboardInterrupt
        drawn = torch.rand(1).item() + np.random.rand() + random.random()  # noqa: NPY002
        return accuracy(pruned) + 0.01 * drawn * next(pruned.parameters()).mean().item()

    dies_at = -1
    whole = quick(noisy)
    assert calls == whole.evaluations == len(whole.points)
    for dies_at in (4, 11):  # in the warm-up and after it
        calls, folder = 0, tmp_path / str(dies_at)
        with pytest.raises(KeyboardInterrupt):
            quick(noisy, folder=folder)
        again = quick(noisy, folder=folder)
        assert plain(again) == plain(whole)
        assert again.evaluations == len(whole.points) - (dies_at - 1)
        assert calls == len(whole.points) + 1  # the one that was killed
        assert quick(noisy, folder=folder).evaluations == 0


def test_another_seed_is_another_search_and_other_random_numbers_go_on() -> None:
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    model = network()
    torch.set_rng_state(states[0])
    given: Any = {"example_inputs": inputs(), "target": Flops(0.5), "episodes": 4, "warmup": 1}
    first, same, other = (amc(model, accuracy, seed=s, **given) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()  # noqa: NPY002
    assert plain(first) == plain(same) != plain(other)


def test_every_network_has_the_same_random_numbers_and_the_threads_of_the_caller() -> None:
    before, seen = torch.get_num_threads(), []

    def look(pruned: nn.Module) -> float:
        drawn = torch.rand(1).item(), np.random.rand(), random.random()  # noqa: NPY002
        seen.append((*drawn, torch.get_num_threads()))
        torch.set_num_threads(3)
        return 0.0

    torch.set_num_threads(2)
    try:
        quick(look)
        assert len(seen) > 6 and len(set(seen)) == 1
        assert seen[0][-1] == torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_noise_begins_after_the_warm_up_of_a_search() -> None:
    calm, noisy = (quick(noise=noise).rewards for noise in (0.0, 0.5))
    assert calm[:6] == noisy[:6]
    assert calm[6:] != noisy[6:]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"episodes": 0}, "episodes=0 must be 1 or more"),
        ({"batch_size": 0}, "batch_size=0 must be 1 or more"),
        ({"warmup": -1}, "warmup=-1"),
        ({"noise": -0.1}, r"noise=-0\.1"),
        ({"hidden": ()}, r"hidden=\(\)"),
        ({"hidden": (8, 0)}, r"hidden=\(8, 0\)"),
        ({"discount": 1.1}, "discount=1.1 must be in"),
        ({"target": None}, "give a target"),
        ({"target": Flops(0.1)}, "allow more, or choose a smaller 'lower'"),
    ],
)
def test_errors(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        quick(**settings)


@pytest.mark.parametrize("missing", ["gymnasium", "stable_baselines3"])
def test_what_to_install(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("amc_agent", "amc_environment"):
        # Importing it anew replaces the package's attribute, too.
        monkeypatch.setattr(search, name, import_module(f"sparsetrain.search.{name}"))
        monkeypatch.delitem(sys.modules, f"sparsetrain.search.{name}")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"pip install 'sparsetrain\[search\]'"):
        quick()
