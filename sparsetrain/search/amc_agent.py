"""AMC's agent: DDPG of Stable-Baselines3, with what He et al. 2018 do on top."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sparsetrain.search.amc_environment import AmcEnvironment

try:
    from stable_baselines3 import DDPG
    from stable_baselines3.common.buffers import ReplayBuffer
    from stable_baselines3.common.logger import Logger
    from stable_baselines3.common.noise import ActionNoise
    from stable_baselines3.common.type_aliases import ReplayBufferSamples
    from stable_baselines3.common.vec_env import VecNormalize
except ImportError as error:
    raise ImportError(
        "AMC needs Gymnasium and Stable-Baselines3: pip install 'sparsetrain[search]'"
    ) from error

_MEMORY = 100  # episodes in the replay buffer
_DECAY = 0.95  # of the noise, an episode
_BASELINE = 0.5  # weight of a batch's mean reward in the moving average


class EpisodeBuffer(ReplayBuffer):
    """Transitions get the reward of their episode, less a baseline.

    They are held back until the episode ends. The baseline is taken off when a batch is drawn (He
    et al. 2018, equation 4), so that rewards of early and late episodes stay comparable. It is the
    exponential moving average of the mean rewards of all batches, as in the authors' code.

    Args:
        seed: of the batches, which depend on no other random numbers.

    Attributes:
        baseline: None before the first batch.
    """

    def __init__(self, *args: Any, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.baseline: float | None = None
        self._held: list[tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]] = []
        self._random = np.random.default_rng(seed)

    def add(
        self,
        obs: NDArray[Any],
        next_obs: NDArray[Any],
        action: NDArray[Any],
        reward: NDArray[Any],
        done: NDArray[Any],
        infos: list[dict[str, Any]],
    ) -> None:
        """Keep a transition; at the end of an episode store them all."""
        self._held.append((obs, next_obs, action, done))
        if done.all():
            for before, after, taken, last in self._held:
                super().add(before, after, taken, reward, last, infos)
            self._held = []

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> ReplayBufferSamples:
        """A batch."""
        places = self._random.integers(self.size(), size=batch_size)
        batch = self._get_samples(places, env)
        mean = float(batch.rewards.mean())
        if self.baseline is None:
            self.baseline = mean
        self.baseline += _BASELINE * (mean - self.baseline)
        return batch._replace(rewards=batch.rewards - self.baseline)


class TruncatedNoise(ActionNoise):
    """Makes an action normal around the actor's, cut off at 0 and 1 (He et al. 2018, section 3.2).

    Args:
        deviation: of the first episode after the warm-up; 0.95 times as much with each further one.
        warmup: episodes without noise, because their actions are random anyway.

    Attributes:
        episode: number of the current one.
        mean: the actor's last action, in [-1, 1] as the agent has it.
    """

    def __init__(self, deviation: float, warmup: int, seed: int = 0) -> None:
        super().__init__()
        self.start, self.warmup = deviation, warmup
        self.episode, self.mean = 0, 0.0
        self._random = np.random.default_rng(seed)

    @property
    def deviation(self) -> float:
        """In shares that are kept."""
        after = self.episode - self.warmup
        return 0.0 if after < 0 else self.start * _DECAY**after

    def watch(self, actor: nn.Module) -> None:
        """Follow an actor's actions."""

        def note(module: nn.Module, args: Any, action: Tensor) -> None:
            if len(action) == 1:  # not a batch that it learns from
                self.mean = float(action)

        actor.register_forward_hook(note)

    def __call__(self) -> NDArray[np.float32]:
        """What to add to the action, [1]; the agent's range is twice as wide as that of shares."""
        deviation = 2 * self.deviation
        if deviation < 1e-9:
            return np.zeros(1, np.float32)
        normal = NormalDist(self.mean, deviation)
        chance = self._random.uniform(normal.cdf(-1.0), normal.cdf(1.0))
        drawn = normal.inv_cdf(min(max(chance, 1e-15), 1 - 1e-15))
        return np.array([min(max(drawn, -1.0), 1.0) - self.mean], np.float32)


def agent_of(
    environment: AmcEnvironment,
    *,
    warmup: int,
    hidden: Sequence[int],
    actor_lr: float,
    critic_lr: float,
    tau: float,
    discount: float,
    batch_size: int,
    noise: float,
    seed: int,
) -> tuple[DDPG, TruncatedNoise]:
    """The agent, which after each episode of the warm-up learns once for each of its steps."""
    steps = len(environment.knobs.knobs)
    exploration = TruncatedNoise(noise, warmup, seed)
    agent = DDPG(
        "MlpPolicy",
        environment,
        learning_rate=critic_lr,
        buffer_size=_MEMORY * steps,
        learning_starts=warmup * steps,
        batch_size=batch_size,
        tau=tau,
        gamma=discount,
        train_freq=(1, "episode"),
        gradient_steps=-1,
        action_noise=exploration,
        replay_buffer_class=EpisodeBuffer,
        replay_buffer_kwargs={"seed": seed},
        policy_kwargs={"net_arch": list(hidden)},
        seed=seed,
        device="cpu",
    )
    agent.set_logger(Logger(None, []))
    exploration.watch(agent.actor)
    _learn_at(agent.actor.optimizer, actor_lr)
    return agent, exploration


def _learn_at(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Keep an optimizer's own learning rate, although the agent writes one for both nets."""

    def restore(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate

    optimizer.register_step_pre_hook(restore)
