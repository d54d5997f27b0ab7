from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

from sparsetrain.cost.targets import Flops
from sparsetrain.search.amc_agent import EpisodeBuffer, TruncatedNoise, agent_of
from sparsetrain.search.amc_environment import AmcEnvironment
from sparsetrain.search.weights import Weights


def buffer(size: int = 100) -> EpisodeBuffer:
    observations, actions = (spaces.Box(0, 1, (n,), np.float32) for n in (2, 1))
    return EpisodeBuffer(size, observations, actions, "cpu", seed=3)


def fill(episodes: EpisodeBuffer, reward: float, steps: int) -> None:
    for step in range(steps):
        is_last = step == steps - 1
        now, then = np.full((1, 2), step / 10), np.full((1, 2), (step + 1) / 10)
        given = np.array([reward if is_last else 0.0])
        episodes.add(now, then, np.array([[reward]]), given, np.array([is_last]), [{}])


def test_transitions_wait_for_the_reward_of_their_episode() -> None:
    episodes = buffer()
    fill(episodes, 0.5, 3)
    fill(episodes, 0.25, 2)
    held = episodes.rewards[:5, 0].tolist()
    assert held == [0.5, 0.5, 0.5, 0.25, 0.25]
    assert episodes.dones[:5, 0].tolist() == [0, 0, 1, 0, 1]
    assert episodes.actions[:5, 0, 0].tolist() == held
    assert episodes.observations[:5, 0, 0].tolist() == pytest.approx([0, 0.1, 0.2, 0, 0.1])
    assert episodes.next_observations[:5, 0, 1].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.1, 0.2])
    done = np.array([False])
    episodes.add(np.zeros((1, 2)), np.zeros((1, 2)), np.zeros((1, 1)), np.zeros(1), done, [{}])
    assert episodes.size() == 5


def test_a_moving_average_of_rewards_is_taken_off_batches() -> None:
    episodes, twin = buffer(), np.random.default_rng(3)
    fill(episodes, 0.5, 3)
    fill(episodes, -0.25, 2)
    held, average = episodes.rewards[:5, 0], None
    for _ in range(4):
        batch = episodes.sample(6)
        raw = held[twin.integers(5, size=6)]
        average = raw.mean() if average is None else (average + raw.mean()) / 2
        assert batch.rewards[:, 0].tolist() == pytest.approx((raw - average).tolist(), abs=1e-6)
        assert episodes.baseline == pytest.approx(average)


def test_batches_depend_on_no_other_random_numbers() -> None:
    drawn = []
    for seed in (1, 2):
        np.random.seed(seed)  # noqa: NPY002
        episodes = buffer()
        fill(episodes, 0.5, 30)
        drawn.append(episodes.sample(20).observations)
    assert torch.equal(*drawn)


def test_noise_begins_after_the_warm_up_and_decays() -> None:
    noise = TruncatedNoise(0.5, warmup=3)
    for episode, expected in ((0, 0.0), (2, 0.0), (3, 0.5), (4, 0.475), (13, 0.5 * 0.95**10)):
        noise.episode = episode
        assert noise.deviation == pytest.approx(expected)
    noise.episode = 2
    assert noise().tolist() == [0.0]
    noise.episode, noise.mean = 60, 0.2
    drawn = np.array([noise() for _ in range(2000)])
    # The agent's range of actions is twice as wide as that of shares.
    assert drawn.std() == pytest.approx(2 * 0.5 * 0.95**57, rel=0.06)
    assert drawn.mean() == pytest.approx(0.0, abs=0.01)


@pytest.mark.parametrize("mean", [-1.0, -0.6, 0.0, 0.9, 1.0])
def test_noise_is_cut_off_without_heaps_at_the_ends(mean: float) -> None:
    noise = TruncatedNoise(0.5, warmup=0, seed=1)
    noise.mean = mean
    actions = mean + np.array([noise()[0] for _ in range(4000)])
    assert (abs(actions) < 1).mean() > 0.999
    grid = np.linspace(-1, 1, 4001)
    density = np.exp(-((grid - mean) ** 2) / 2)
    assert actions.mean() == pytest.approx((grid * density).sum() / density.sum(), abs=0.03)


def agent(**settings: Any) -> Any:
    model = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 15), nn.Linear(15, 10))
    knobs = Weights().bind(model, torch.ones(2, 12))
    environment = AmcEnvironment(knobs, lambda network: 0.5, target=Flops(0.6))
    given = {
        "warmup": 2,
        "hidden": (8,),
        "actor_lr": 1e-4,
        "critic_lr": 1e-3,
        "tau": 0.01,
        "discount": 1.0,
        "batch_size": 4,
        "noise": 0.0,
        "seed": 0,
    }
    return agent_of(environment, **{**given, **settings})


def test_the_agent_learns_once_a_step_after_the_warm_up() -> None:
    made, noise = agent()
    within: list[int] = []  # updates that were made before each step
    for episode in range(5):
        noise.episode = episode
        made.learn(
            3,
            callback=lambda *_: within.append(made._n_updates) or True,
            reset_num_timesteps=False,
        )
        assert made._n_updates == 3 * max(episode - 1, 0)
    assert within == [0] * 9 + [3] * 3 + [6] * 3
    rates = [net.optimizer.param_groups[0]["lr"] for net in (made.actor, made.critic)]
    assert rates == [1e-4, 1e-3]
    assert made.gamma == 1.0 and made.tau == 0.01 and made.batch_size == 4


def test_actions_are_the_actors_and_noise_is_around_them() -> None:
    made, noise = agent(actor_lr=0.0)
    made.learn(9)  # two episodes of the warm-up
    stored = made.replay_buffer
    shown = torch.from_numpy(stored.observations[6:9, 0])
    with torch.no_grad():
        expected = made.actor(shown)
    assert stored.actions[6:9, 0].tolist() == pytest.approx(expected.numpy(), abs=1e-6)
    assert noise.mean == pytest.approx(float(expected[-1]), abs=1e-6)
    assert len(set(stored.actions[:6, 0, 0].tolist())) == 6


def test_a_seed_is_that_of_batches_and_noise() -> None:
    made = [agent(seed=seed) for seed in (0, 1)]
    for numbers in ([a.replay_buffer._random for a, _ in made], [n._random for _, n in made]):
        assert numbers[0].random() != numbers[1].random()
