"""AMC's environment: the layers of a network one after the other, and a share to keep of each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from sparsetrain.cost.layers import LayerUse
from sparsetrain.cost.targets import CostTarget, Flops
from sparsetrain.search.evaluations import Evaluate, Evaluations
from sparsetrain.search.knobs import CostOf, Knob, Knobs
from sparsetrain.search.points import Point

try:
    import gymnasium
except ImportError as error:
    raise ImportError(
        "AMC needs Gymnasium and Stable-Baselines3: pip install 'sparsetrain[search]'"
    ) from error

RewardKind = Literal["accuracy", "error_flops"]
Array = NDArray[np.float32]

#: What an observation holds, in this order.
FEATURES = ("t", "n", "c", "h", "w", "stride", "k", "flops", "reduced", "rest", "previous")

_STEPS = 4096  # ratios of a knob that the wall tells apart, at most
_UNITS = {"latency": 1e9, "energy": 1e12}  # nanoseconds and picojoules: logarithms above 0


@dataclass(frozen=True)
class Outcome:
    """What an episode led to."""

    point: Point
    reward: float


class AmcEnvironment(gymnasium.Env[Array, Array]):
    """One step for each knob, in the order of the model. An episode gives one network.

    He, Lin, Liu, Wang, Li & Han 2018, "AMC: AutoML for model compression and acceleration on mobile
    devices", ECCV, section 3.

    The action, [1] in [0, 1], is the share of the knob's channels or weights that is kept. Where
    that would put the target out of reach even if all later knobs went to `lower`, it is made as
    much smaller as it has to be, in steps of one channel, or of a 4096th of a larger knob. So every
    episode ends within the target.

    The observation, [11] in [0, 1], is of the first layer that the knob changes (equation 1): its
    number t, outputs n, inputs c, height h and width w of what goes in, stride, kernel k and FLOPs,
    each from the least of all layers to the largest; FLOPs that are saved already, and FLOPs of the
    layers after this one, both as shares of the network's; the share that the previous knob kept.

    The reward is 0 until the last step, and then one of

    - "accuracy": the metric;
    - "error_flops": -(1 - metric) log(FLOPs) (equation 5); with a target, its measure takes the
      place of FLOPs, latency in nanoseconds and energy in picojoules.

    `info` has the `ratios` that were set so far, and at the end the `metric` and the `cost` in the
    target's unit.

    Args:
        evaluate: takes a pruned copy of the model, and returns its metric; or kept evaluations.
        target: what the network may cost. Without one, cost is FLOPs and has no bound.
        reward: at the end of an episode.
        lower: least share that each knob keeps, in (0, 1).

    Attributes:
        history: the outcome of every whole episode.

    Raises:
        ValueError: a bad argument, no example inputs, or a target that cannot be met.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 (as declared by Gymnasium)

    def __init__(
        self,
        knobs: Knobs,
        evaluate: Evaluate | Evaluations,
        *,
        target: CostTarget | None = None,
        reward: RewardKind = "accuracy",
        lower: float = 0.2,
    ) -> None:
        _check(target, reward, lower)
        self.knobs, self.reward_kind, self.lower = knobs, reward, lower
        if not isinstance(evaluate, Evaluations):
            evaluate = Evaluations(knobs, evaluate)
        self.evaluations = evaluate
        self.cost = CostOf(target or Flops(1.0), knobs)
        self.is_bounded = target is not None
        self.history: list[Outcome] = []
        self.observation_space = gymnasium.spaces.Box(0.0, 1.0, (len(FEATURES),), np.float32)
        self.action_space = gymnasium.spaces.Box(0.0, 1.0, (1,), np.float32)
        self._table = _table(knobs)
        self._whole_flops = max(sum(use.flops for use in knobs.uses), 1e-30)
        self._ratios: dict[str, float] | None = None
        self._check_reach()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Begin with the network as it is."""
        super().reset(seed=seed)
        self._ratios = {}
        return self._observation({}), {"ratios": {}}

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Set the next knob.

        Raises:
            gymnasium.error.ResetNeeded: the episode is over, or has not begun.
            ValueError: the metric is not what the reward needs.
        """
        if self._ratios is None:
            raise gymnasium.error.ResetNeeded("call reset() first: no episode is running")
        ratios = self._ratios
        share = min(max(float(action[0]), self.lower), 1.0)
        knob = self.knobs.knobs[len(ratios)]
        ratios[knob.name] = self._walled(ratios, knob, 1.0 - share)
        observation, info = self._observation(ratios), {"ratios": dict(ratios)}
        if len(ratios) < len(self.knobs.knobs):
            return observation, 0.0, False, False, info
        self._ratios = None
        cost, done = self.cost(ratios), self.evaluations.of(ratios)
        reward = self._reward(done.metric, cost)
        point = Point(done.ratios, done.metric, cost / max(self.cost.whole, 1e-30), done.seconds)
        self.history.append(Outcome(point, reward))
        return observation, reward, True, False, {**info, "metric": done.metric, "cost": cost}

    def _walled(self, before: dict[str, float], knob: Knob, asked: float) -> float:
        """The ratio nearest to the asked one with which the target is still in reach.

        The largest ratio always is: all later knobs are at theirs when a ratio is accepted.
        """
        if not self.is_bounded:
            return asked
        most = 1.0 - self.lower
        later = {name: most for name in self.knobs.names if name not in before}

        def is_enough(ratio: float) -> bool:
            return self.cost.holds({**before, **later, knob.name: ratio})

        if is_enough(asked):
            return asked
        steps = min(knob.size, _STEPS)
        low, high = math.floor(asked * steps), math.ceil(most * steps)
        while high - low > 1:
            middle = (low + high) // 2
            if is_enough(min(middle / steps, most)):
                high = middle
            else:
                low = middle
        return min(high / steps, most)

    def _observation(self, ratios: dict[str, float]) -> Array:
        """Of the next knob; after the last one it is shown once more."""
        features = self._table[min(len(ratios), len(self._table) - 1)].copy()
        if ratios:
            left = sum(use.flops for use in self.knobs.layers(ratios)) / self._whole_flops
            features[FEATURES.index("reduced")] = 1 - left
            features[FEATURES.index("previous")] = 1 - self.knobs.rounded(ratios)[[*ratios][-1]]
        return np.asarray(np.clip(features, 0, 1), np.float32)

    def _reward(self, metric: float, cost: float) -> float:
        if self.reward_kind == "accuracy":
            return metric
        if not 0 <= metric <= 1:
            raise ValueError(
                f"reward='error_flops' needs an accuracy in [0, 1], and evaluate returned {metric}"
            )
        return -(1 - metric) * self._log(cost)

    def _log(self, cost: float) -> float:
        return math.log(max(cost, 1e-30) * _UNITS.get(self.cost.target.kind, 1.0))

    def _check_reach(self) -> None:
        least = self.knobs.uniform(1.0 - self.lower)
        if self.is_bounded and not self.cost.holds(least):
            state = f"with a share of {self.lower} of every layer"
            reason = self.cost.budget.out_of_reach(state, self.cost(least))
            raise ValueError(f"{reason}: allow more, or choose a smaller 'lower'")
        if self.reward_kind == "error_flops" and self._log(self.cost(least)) <= 0:
            raise ValueError(
                f"reward='error_flops' needs costs above 1, and {self.cost.target.kind!r} goes "
                f"down to {self.cost(least):,.6g} {self.cost.target.unit}: take reward='accuracy'"
            )


def _check(target: CostTarget | None, reward: str, lower: float) -> None:
    if reward not in get_args(RewardKind):
        raise ValueError(f"reward={reward!r} is not one of {', '.join(get_args(RewardKind))}")
    if reward == "accuracy" and target is None:
        raise ValueError(
            "reward='accuracy' alone lets everything stay: give a target, or take "
            "reward='error_flops'"
        )
    if not 0 < lower < 1:
        raise ValueError(f"lower={lower} must be in (0, 1)")


def _table(knobs: Knobs) -> NDArray[np.float64]:
    """[knobs, features] of the network as it is."""
    places = [_place(knob, knobs.uses) for knob in knobs.knobs]
    sizes = [_sizes(None if place is None else knobs.uses[place]) for place in places]
    static = np.array([[t, *size] for t, size in enumerate(sizes)], dtype=np.float64)
    least, span = static.min(axis=0), np.ptp(static, axis=0)
    scaled = (static - least) / np.where(span > 0, span, 1.0)
    flops = [use.flops for use in knobs.uses]
    after = [0.0 if place is None else sum(flops[place + 1 :]) for place in places]
    rest = np.array(after) / max(sum(flops), 1e-30)
    return np.column_stack([scaled, np.zeros(len(rest)), rest, np.ones(len(rest))])


def _place(knob: Knob, uses: list[LayerUse]) -> int | None:
    """Number of the first layer that a knob changes, its own one first; None if it has no such."""
    for wanted in ((knob.name,), knob.layers):
        for number, use in enumerate(uses):
            if use.name in wanted or use.layer in wanted:
                return number
    return None


def _sizes(use: LayerUse | None) -> tuple[float, ...]:
    """n, c, h, w, stride, k, FLOPs."""
    if use is None:
        return (0.0,) * 7
    height, width = (1, 1, *use.in_size)[-2:]
    stride, kernel = (0, *use.stride)[-1], (1, *use.kernel)[-1]
    return use.outputs, use.inputs, height, width, stride, kernel, use.flops
