from __future__ import annotations

import math
import warnings

import gymnasium
import numpy as np
import pytest
import torch
from channels_networks import Concatenated, images
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_env_of_sb3
from torch import nn

from sparsetrain.cost.layers import layers_used
from sparsetrain.cost.targets import CompressionRate, Energy, Flops
from sparsetrain.search.amc_environment import FEATURES, AmcEnvironment
from sparsetrain.search.channels import Channels
from sparsetrain.search.evaluations import Evaluations
from sparsetrain.search.knobs import ByFunction, Pruning
from sparsetrain.search.weights import Weights


def tiny() -> nn.Sequential:
    """36, 96 and 108 weights; 12, 6 and 1 positions of 8 x 6 images."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 6, 2),
        nn.Flatten(),
        nn.Linear(36, 3),
    )


def wide_images() -> torch.Tensor:
    return torch.randn(2, 1, 8, 6, generator=torch.Generator().manual_seed(0))


def environment(
    pruning: Pruning | None = None, metric: float = 0.75, **settings: object
) -> AmcEnvironment:
    knobs = (pruning or Weights()).bind(tiny(), wide_images())
    return AmcEnvironment(knobs, lambda network: metric, **settings)  # type: ignore[arg-type]


def keep(share: float) -> np.ndarray:
    return np.array([share], np.float32)


@pytest.mark.parametrize("pruning", [Weights(), Channels(round_to=2)], ids=["weights", "channels"])
@pytest.mark.parametrize("reward", ["accuracy", "error_flops"])
def test_checkers_of_gymnasium_and_sb3(pruning: Pruning, reward: str) -> None:
    checked = environment(pruning, target=Flops(0.5), reward=reward)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(checked, skip_render_check=True)
        # Actions are shares as in the paper; the agent scales them to [-1, 1] itself.
        warnings.filterwarnings("ignore", message=".*symmetric and normalized Box action space")
        check_env_of_sb3(checked)


def test_observations_by_hand() -> None:
    env = environment(target=Flops(1.0))
    flops = [2 * 36 * 12, 2 * 96 * 6, 2 * 108]
    total = sum(flops)
    size = (flops[0] - flops[2]) / (flops[1] - flops[2])
    # t, n, c, h, w, stride, k, FLOPs, reduced, rest, kept of the last one
    first, info = env.reset(seed=0)
    rest = (flops[1] + flops[2]) / total
    assert first.tolist() == pytest.approx([0, 1 / 3, 0, 1, 1, 1, 1, size, 0, rest, 1])
    assert info == {"ratios": {}}

    second, *_ = env.step(keep(0.5))
    saved, rest = flops[0] / 2 / total, flops[2] / total
    expected = [0.5, 1, 3 / 35, 3 / 7, 2 / 5, 0.5, 0.5, 1, saved, rest, 0.5]
    assert second.tolist() == pytest.approx(expected)

    third, *_ = env.step(keep(0.253))  # 24.3 of 96 weights: 24 stay
    saved += flops[1] * 0.75 / total
    expected = [1, 0, 1, 0, 0, 0, 0, 0, saved, 0, 0.25]
    assert third.tolist() == pytest.approx(expected)

    last, _, is_over, is_cut, info = env.step(keep(1.0))
    assert last.tolist() == pytest.approx([*expected[:-1], 1.0])
    assert (is_over, is_cut) == (True, False)
    assert info["cost"] == pytest.approx(total * (1 - saved))
    assert info["metric"] == 0.75
    assert list(info["ratios"]) == ["0.weight", "2.weight", "4.weight"]


def test_a_coupling_shows_its_first_layer_and_what_the_network_saves() -> None:
    model = Concatenated()
    knobs = Channels().bind(model, images())
    env = AmcEnvironment(knobs, lambda network: 0.0, target=Flops(1.0))
    outputs = {name: dict(model.named_modules())[name].out_channels for name in knobs.names}
    least, most = min(outputs.values()), max(outputs.values())
    observation, _ = env.reset(seed=0)
    ratios: dict[str, float] = {}
    for name in knobs.names:
        shown = observation[FEATURES.index("n")]
        assert shown == pytest.approx((outputs[name] - least) / (most - least))
        smaller = layers_used(knobs.network(ratios), images())
        saved = 1 - sum(u.flops for u in smaller) / sum(u.flops for u in knobs.uses)
        assert observation[FEATURES.index("reduced")] == pytest.approx(saved)
        observation, *_, info = env.step(keep(0.5))
        ratios = info["ratios"]


def test_what_is_no_layer_has_no_sizes() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4))
    knobs = ByFunction(lambda net, ratios: None, ["0", "1"]).bind(model, torch.randn(2, 6))
    env = AmcEnvironment(knobs, lambda network: 0.0, target=Flops(1.0))
    env.reset(seed=0)
    observation, *_ = env.step(keep(0.4))
    assert observation.tolist() == pytest.approx([1, *[0] * 9, 0.4])


def test_features_in_which_layers_do_not_differ() -> None:
    knobs = Weights().bind(nn.Linear(6, 4), torch.randn(2, 6))
    env = AmcEnvironment(knobs, lambda network: 0.0, target=Flops(1.0))
    assert env.reset(seed=0)[0].tolist() == [*[0] * 10, 1]
    assert env.step(keep(0.5))[0].tolist() == [*[0] * 8, 0.5, 0, 0.5]
    assert env.reset()[0].tolist() == [*[0] * 10, 1]


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.attention(q, k, v)[0]


def test_weights_of_one_module_are_told_apart() -> None:
    knobs = Weights().bind(Attending(), tuple(torch.randn(2, 3, width) for width in (8, 6, 4)))
    env = AmcEnvironment(knobs, lambda network: 0.0, target=Flops(1.0))
    shown = [env.reset(seed=0)[0], *(env.step(keep(1.0))[0] for _ in range(3))]
    assert [name.rpartition("attention.")[2] for name in knobs.names] == [
        "q_proj_weight",
        "k_proj_weight",
        "v_proj_weight",
        "out_proj.weight",
    ]
    inputs = [float(observation[FEATURES.index("c")]) for observation in shown]
    assert inputs == [1.0, 0.5, 0.0, 1.0]


def test_without_a_target_there_is_no_wall() -> None:
    env = environment(reward="error_flops")
    env.reset(seed=0)
    for share in (1.0, 0.9, 0.1):
        *_, info = env.step(keep(share))
    assert [*info["ratios"].values()] == pytest.approx([0.0, 0.1, 0.8])


def last_reward(env: AmcEnvironment) -> float:
    env.reset(seed=0)
    rewards = [env.step(keep(0.5))[1] for _ in env.knobs.names]
    assert rewards[:-1] == [0.0, 0.0]
    assert env.history[-1].reward == rewards[-1]
    return rewards[-1]


def test_rewards_by_hand() -> None:
    half = (864 + 1152 + 216) / 2
    assert last_reward(environment(target=Flops(0.7))) == 0.75
    plain = environment(reward="error_flops")
    assert last_reward(plain) == pytest.approx(-0.25 * math.log(half))
    assert plain.history[-1].point.cost == pytest.approx(0.5)
    numbers = environment(reward="error_flops", target=CompressionRate(1.5))
    # Biases are never pruned.
    assert last_reward(numbers) == pytest.approx(-0.25 * math.log(240 / 2 + 13))
    energy = environment(reward="error_flops", target=Energy(0.95))
    reward = last_reward(energy)
    joules = energy.history[-1].point.cost * energy.cost.whole
    assert reward == pytest.approx(-0.25 * math.log(joules * 1e12))


def test_an_episode_is_evaluated_once() -> None:
    seen: list[nn.Module] = []
    knobs = Weights().bind(tiny(), wide_images())
    evaluations = Evaluations(knobs, lambda network: float(len(seen.append(network) or seen)))
    env = AmcEnvironment(knobs, evaluations, target=Flops(0.6))
    for _ in range(2):
        env.reset()
        for share in (0.5, 0.5, 1.0):
            env.step(keep(share))
    assert len(seen) == 1
    assert [outcome.reward for outcome in env.history] == [1.0, 1.0]
    density = [float((p != 0).float().mean()) for p in seen[0].parameters() if p.ndim > 1]
    assert density == [0.5, 0.5, 1.0]


def test_an_episode_has_to_be_begun() -> None:
    env = environment(target=Flops(0.5))
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(keep(0.5))
    last_reward(env)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(keep(0.5))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"reward": "speed", "target": Flops(0.5)}, "reward='speed' is not one of accuracy"),
        ({}, "give a target"),
        ({"target": Flops(0.5), "lower": 0.0}, "lower=0.0 must be in"),
        ({"target": Flops(0.5), "lower": 1.0}, "lower=1.0 must be in"),
        (
            {"target": Flops(0.1)},
            r"allows 223.2 FLOPs a sample, .* of 0.2 .* still 4[0-9.]+",
        ),
    ],
)
def test_errors(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        environment(**settings)


def test_a_metric_that_is_no_accuracy() -> None:
    with pytest.raises(ValueError, match=r"an accuracy in \[0, 1\], and evaluate returned 75"):
        last_reward(environment(metric=75.0, reward="error_flops"))
    assert last_reward(environment(metric=75.0, target=Flops(0.6))) == 75.0


def test_costs_whose_logarithm_changes_its_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsetrain.search.amc_environment._UNITS", {})
    with pytest.raises(ValueError, match="needs costs above 1, and 'energy' goes down to"):
        environment(reward="error_flops", target=Energy(0.9))


def test_inputs_are_needed() -> None:
    knobs = Weights().bind(tiny(), None)
    with pytest.raises(ValueError, match="give example_inputs"):
        AmcEnvironment(knobs, lambda network: 0.0, target=CompressionRate(2))
