"""AMC: an agent that learns which share of each layer to keep."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from sparsetrain._threads import torch_threads
from sparsetrain.cost.targets import CostTarget
from sparsetrain.pruning.rewinding import random_state, set_random_state
from sparsetrain.report.progress import tracked
from sparsetrain.search.evaluations import Evaluate, Evaluations
from sparsetrain.search.points import Point, SearchResult
from sparsetrain.search.weights import Prunes, pruning_of

if TYPE_CHECKING:
    from sparsetrain.search.amc_environment import Outcome, RewardKind


@dataclass(frozen=True)
class AmcResult(SearchResult):
    """What AMC found.

    Attributes:
        rewards: of every episode.
        rewarded: the point with the highest reward; of several the first one.
    """

    rewards: tuple[float, ...]
    rewarded: Point

    @property
    def best(self) -> Point:
        """The point with the highest reward."""
        return self.rewarded


def amc(
    model: nn.Module,
    evaluate: Evaluate,
    *,
    prune: Prunes = "magnitude",
    example_inputs: Any = None,
    target: CostTarget | None = None,
    reward: RewardKind = "accuracy",
    episodes: int = 400,
    warmup: int = 100,
    lower: float = 0.2,
    hidden: Sequence[int] = (300, 300),
    actor_lr: float = 1e-4,
    critic_lr: float = 1e-3,
    tau: float = 0.01,
    discount: float = 1.0,
    batch_size: int = 64,
    noise: float = 0.5,
    folder: Path | str | None = None,
    seed: int = 0,
    progress: bool = False,
) -> AmcResult:
    """Let an agent learn which share of each knob to keep, one knob after the other.

    He, Lin, Liu, Wang, Li & Han 2018, "AMC: AutoML for model compression and acceleration on mobile
    devices", ECCV. An episode gives one network, which is evaluated once; the agent is DDPG of
    Stable-Baselines3. See `AmcEnvironment` for what it sees and what it is rewarded for.

    Args:
        evaluate: takes a pruned copy of the model, and returns its metric: a number that is larger
            for better networks, and an accuracy in [0, 1] for reward "error_flops". torch, numpy
            and Python give it the same random numbers for every network.
        prune: as for `st.search.sensitivity`.
        example_inputs: a batch, [N, ...], or a tuple of positional or a mapping of keyword
            arguments, for one call of the model.
        target: what every network has to keep within.
        reward: "accuracy", within a target, or "error_flops".
        episodes: how many networks are tried.
        warmup: the first episodes, whose shares are uniformly random.
        lower: least share that each knob keeps, in (0, 1).
        hidden: widths of the hidden layers of actor and critic.
        actor_lr, critic_lr: learning rates.
        tau: how far target nets move in a step.
        discount: of later rewards, in [0, 1].
        batch_size: transitions a step of learning.
        noise: standard deviation of the shares in the first episode after the warm-up; it falls by
            5 % with each further one.
        folder: where evaluations are kept. The same call goes on where it was stopped, and ends as
            it would have without the stop.
        progress: whether to show a bar.

    Returns:
        Every network of the search, and the one with the highest reward.

    Raises:
        ImportError: Gymnasium or Stable-Baselines3 is not installed.
        ValueError: a bad argument, no example inputs, or a target that cannot be met.
    """
    from sparsetrain.search.amc_agent import agent_of
    from sparsetrain.search.amc_environment import AmcEnvironment

    _check(episodes, warmup, hidden, batch_size, noise, discount)

    threads = torch.get_num_threads()

    def same_numbers(network: nn.Module) -> float:
        with _random_numbers(seed), torch_threads(threads):
            return evaluate(network)

    knobs = pruning_of(prune).bind(model, example_inputs)
    evaluations = Evaluations(knobs, same_numbers, folder)
    environment = AmcEnvironment(knobs, evaluations, target=target, reward=reward, lower=lower)
    with _random_numbers(seed), torch_threads(1):  # the agent's nets are too small for more
        agent, exploration = agent_of(
            environment,
            warmup=warmup,
            hidden=hidden,
            actor_lr=actor_lr,
            critic_lr=critic_lr,
            tau=tau,
            discount=discount,
            batch_size=batch_size,
            noise=noise,
            seed=seed,
        )
        for episode in tracked(range(episodes), "AMC", progress=progress):
            exploration.episode = episode
            agent.learn(len(knobs.knobs), reset_num_timesteps=False)
    return _result(environment.history, evaluations, environment.cost.target)


def _result(history: list[Outcome], evaluations: Evaluations, target: CostTarget) -> AmcResult:
    points: dict[str, Point] = {}
    for outcome in history:
        points.setdefault(str(outcome.point.ratios), outcome.point)
    best = max(history, key=lambda outcome: outcome.reward).point
    rewards = tuple(outcome.reward for outcome in history)
    every = tuple(points.values())
    return AmcResult("amc", evaluations.knobs, target, every, evaluations.new, rewards, best)


def _check(
    episodes: int,
    warmup: int,
    hidden: Sequence[int],
    batch_size: int,
    noise: float,
    discount: float,
) -> None:
    for name, value in {"episodes": episodes, "batch_size": batch_size}.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be 1 or more")
    if warmup < 0 or noise < 0:
        raise ValueError(f"warmup={warmup} and noise={noise} must be 0 or more")
    if not hidden or min(hidden) < 1:
        raise ValueError(f"hidden={tuple(hidden)} must be widths of one layer or more")
    if not 0 <= discount <= 1:
        raise ValueError(f"discount={discount} must be in [0, 1]")


@contextmanager
def _random_numbers(seed: int) -> Iterator[None]:
    """Random numbers of torch, numpy and Python that begin with a seed, and go on as before."""
    before = random_state()
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (what users' functions and the agent draw from)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        set_random_state(before)
