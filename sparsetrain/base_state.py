"""What the wrapped optimizer keeps for a weight, handled by shape and not by its name or class.

Any state tensor shaped like the parameter belongs to its weights one by one. It is exactly 0
where a weight is inactive, and *fresh* where a weight has just grown: what the optimizer itself
would hold for a weight that has always been 0 with zero gradients. Fresh is 0 for nearly every
tensor of every optimizer (Rprop's step sizes are an exception); it is found by trying the
optimizer out, not from a list.
"""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from sparsetrain.master_weights import MasterWeights
from sparsetrain.targets import Exchanged, ExchangeTarget, SparseTarget

_TRIAL_STEPS = 4
_SCHEDULED = {"initial_lr", "max_lr", "min_lr"}


@dataclass(frozen=True)
class Resting:
    """How an optimizer treats weights that are 0 and get zero gradients.

    Attributes:
        keeps_zeros: weights and state stay exactly 0, so nothing needs repair after a step.
        fresh: state key -> its value for such a weight.
    """

    keeps_zeros: bool = False
    fresh: dict[str, float] = field(default_factory=dict)


class RestingStates:
    """What is known of an optimizer's resting weights; each parameter group is tried once."""

    def __init__(self, base: Optimizer) -> None:
        self._base = base
        self._found: dict[int, Resting] = {}
        self._group_of: dict[int, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_group_of": {}}  # ids of this process's parameters

    def look_again(self) -> None:
        """Forget which group a parameter is in: parameters came, or were replaced."""
        self._group_of.clear()

    def of(self, param: Tensor) -> Resting:
        """How the optimizer treats weights of this parameter."""
        index = self._group_of.get(id(param))
        if index is None:
            for number, group in enumerate(self._base.param_groups):
                self._group_of.update(dict.fromkeys(map(id, group["params"]), number))
            index = self._group_of[id(param)]
        if index not in self._found:
            self._found[index] = find_resting(self._base, self._base.param_groups[index], param)
        return self._found[index]


def find_resting(base: Optimizer, group: dict[str, Any], like: Tensor) -> Resting:
    """Try the optimizer, with the options of `group`, on a small matrix that is half inactive."""
    param = Parameter(torch.zeros(4, 8, dtype=like.dtype, device=like.device))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(_TRIAL_STEPS + 1, 4, 8, generator=generator).to(param)
    # Scattered, because whole rows or columns of zeros survive what single ones do not (Muon).
    active = torch.rand(4, 8, generator=generator).to(param) < 0.5
    *gradients, start = torch.where(active, noise, 0.0)
    state = _try(base, group, param, start, gradients)
    # An optimizer that needs a closure, say, cannot be tried; then nothing is taken for granted and
    # its zeros are restored after every step.
    return Resting() if state is None else _judge(param, active, state)


def why_not_resized(base: Optimizer, param: Parameter) -> str:
    """Why a vector of another size cannot take the place of `param`; empty when it can."""
    matrix, vector = _states_of_both(base, group_of(base, param), param)
    if matrix is not None and vector is not None:
        return ""
    can_be_tried = matrix is not None
    return f"its optimizer {'trains matrices alone' if can_be_tried else 'cannot be tried out'}"


def _states_of_both(
    base: Optimizer, group: dict[str, Any], like: Tensor
) -> list[dict[str, Any] | None]:
    """What the optimizer keeps for a matrix and for a vector; None for one it cannot train."""
    states = []
    for shape in ((4, 8), (32,)):
        trial = Parameter(torch.zeros(shape, dtype=like.dtype, device=like.device))
        start = torch.ones_like(trial)
        states.append(_try(base, group, trial, start, [start, -start]))
    return states


def _try(
    base: Optimizer,
    group: dict[str, Any],
    param: Parameter,
    start: Tensor,
    gradients: list[Tensor],
) -> dict[str, Any] | None:
    """State after a few steps from `start`, or None if the optimizer cannot make them."""
    for make in (_copy_of, _made_anew):
        with torch.no_grad():
            param.copy_(start)
        try:
            with torch.random.fork_rng(_cuda_devices(param)):
                trial = make(base, {**group, "params": [param], **_moving(group)})
                # Without its wrapper the step runs no hooks, neither global ones nor profiling.
                step = getattr(type(trial).step, "__wrapped__", type(trial).step)
                for gradient in gradients:
                    param.grad = gradient.clone()
                    step(trial)
        except Exception:
            continue
        state: dict[str, Any] = trial.state[param]
        return state
    return None


def _moving(group: dict[str, Any]) -> dict[str, Any]:
    """A learning rate that moves weights, should a warm-up begin at 0."""
    return {} if float(group.get("lr", 1.0)) else {"lr": 0.01}


def _cuda_devices(tensor: Tensor) -> list[torch.device]:
    return [tensor.device] if tensor.device.type == "cuda" else []


def _copy_of(base: Optimizer, group: dict[str, Any]) -> Optimizer:
    trial = copy.copy(base)
    trial.state = defaultdict(dict)
    trial.param_groups = [group]
    return trial


def _made_anew(base: Optimizer, group: dict[str, Any]) -> Optimizer:
    """For optimizers that fill their state when they are made (Adagrad in older torch)."""
    if isinstance(base, MasterWeights):
        return MasterWeights(_made_anew(base.inner, group))
    if not type(base).__module__.startswith("torch.optim"):
        raise TypeError("the constructor of somebody else's optimizer may do anything")
    make: Any = type(base)
    trial: Optimizer = make([group], **base.defaults)
    return trial


def _judge(param: Parameter, active: Tensor, state: dict[str, Any]) -> Resting:
    keeps_zeros = bool((param.detach()[~active] == 0).all())
    fresh = {}
    for key, tensor in shaped_state(state, param):
        idle = tensor[~active]
        steady = bool((idle == idle[0]).all())
        fresh[key] = float(idle[0]) if steady else 0.0
        keeps_zeros &= steady and fresh[key] == 0.0
    return Resting(keeps_zeros, fresh)


def shaped_state(state: dict[str, Any], param: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The state tensors that hold one number for each weight."""
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == param.shape and value.dim() > 0:
            yield key, value


def carry_state(
    base: Optimizer,
    target: ExchangeTarget,
    change: Callable[[], Exchanged],
    fresh: dict[str, float],
) -> Exchanged:
    """Make an exchange of connections and take the optimizer's state along.

    Args:
        change: exchanges connections of the target.
        fresh: state key -> what a new connection starts with.
    """
    param = target.param
    done = change()

    def moved(key: str, tensor: Tensor) -> Tensor:
        return target.renewed(tensor, done.gone, done.new, fresh.get(key, 0.0))

    if target.param is not param:
        replace_parameter(base, param, target.param, moved)
    else:
        state: dict[str, Any] = base.state.get(param, {})
        for key, tensor in list(shaped_state(state, param)):
            state[key] = moved(key, tensor)
    return done


def replace_parameter(
    base: Optimizer, old: Parameter, new: Parameter, moved: Callable[[str, Tensor], Tensor]
) -> None:
    """Let the optimizer train `new` in the place of `old`.

    Args:
        moved: (key, state tensor shaped like `old`) -> the same shaped like `new`.
    """
    group = group_of(base, old)
    group["params"][:] = [new if held is old else held for held in group["params"]]
    if old not in base.state:
        return
    state: dict[str, Any] = base.state.pop(old)
    if (old.dim() > 1) != (new.dim() > 1) and not _keeps_the_same(base, group, new):
        return  # Adafactor, for one, factors its state for matrices: it starts anew
    shaped = dict(shaped_state(state, old))
    others = [v for k, v in state.items() if k not in shaped and isinstance(v, Tensor) and v.dim()]
    if not others:  # what only fits the old shape cannot be carried: it starts anew
        base.state[new] = {k: moved(k, v) if k in shaped else v for k, v in state.items()}


def group_of(base: Optimizer, param: Tensor) -> dict[str, Any]:
    """The parameter group that a parameter is in."""
    groups = base.param_groups
    return next(group for group in groups if any(held is param for held in group["params"]))


def options_like(group: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Options of another parameter group: those of `group`, but for its `own`.

    What learning-rate schedulers have left in the group is kept in proportion.
    """
    options = {key: value for key, value in group.items() if key != "params"} | own
    ratio = float(own["lr"]) / float(group["lr"]) if group["lr"] else 1.0
    for key in _SCHEDULED & options.keys():
        options[key] = ratio * float(options[key])
    if isinstance(group["lr"], Tensor):  # compiled optimizers take a new number for a new program
        options["lr"] = torch.full_like(group["lr"], float(own["lr"]))
    return options


def add_group(
    base: Optimizer, parameters: list[Parameter], options: dict[str, Any], who: str
) -> None:
    """Let the optimizer train more parameters, in a group of their own.

    Raises:
        ValueError: it cannot; it is then as it was.
    """
    try:
        _try_two_groups(base)
        base.add_param_group({"params": parameters, **options})
    except ValueError as error:
        raise ValueError(
            f"{type(base).__name__} cannot train the gates of policy {who!r}: {error}"
        ) from error


def _try_two_groups(base: Optimizer) -> None:
    """Raise ValueError for an optimizer that takes one group alone; it says so when it is made."""
    if isinstance(base, MasterWeights):
        base = base.inner
    if not type(base).__module__.startswith("torch.optim"):
        return
    make: Any = type(base)
    known = inspect.signature(make.__init__).parameters
    options = {key: value for key, value in base.defaults.items() if key in known}
    make([{"params": [Parameter(torch.zeros(4, 4))]} for _ in range(2)], **options)


def drop_parameters(base: Optimizer, parameters: list[Parameter]) -> None:
    """Let the optimizer forget parameters, and groups that were theirs alone."""
    gone = {id(parameter) for parameter in parameters}
    for group in list(base.param_groups):
        held = [parameter for parameter in group["params"] if id(parameter) not in gone]
        if len(held) < len(group["params"]):
            group["params"][:] = held
            if not held:
                base.param_groups.remove(group)
    for parameter in parameters:
        base.state.pop(parameter, None)


def is_scale_free(base: Optimizer, group: dict[str, Any], like: Tensor) -> bool:
    """Whether gradients a thousand times as large would make (nearly) the same steps."""
    param = Parameter(torch.zeros(4, 8, dtype=like.dtype, device=like.device))
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(_TRIAL_STEPS, 4, 8, generator=generator).to(param)
    ends: list[Tensor] = []
    for factor in (1.0, 1000.0):
        start = torch.zeros_like(param)
        if _try(base, group, param, start, [factor * g for g in gradients]) is None:
            return False
        ends.append(param.detach().clone())
    return torch.allclose(ends[0], ends[1], rtol=0.01, atol=0.0)


def _keeps_the_same(base: Optimizer, group: dict[str, Any], like: Tensor) -> bool:
    """Whether the optimizer keeps the same for a matrix and for a vector."""
    matrix, vector = _states_of_both(base, group, like)
    return matrix is not None and vector is not None and matrix.keys() == vector.keys()


def zero_inactive_state(base: Optimizer, target: SparseTarget) -> None:
    """Zero the state of all inactive weights."""
    for _, tensor in shaped_state(base.state.get(target.param, {}), target.param):
        target.mask_state(tensor)


def total_numel(base: Optimizer) -> int:
    """Numbers that the optimizer trains."""
    return sum(param.numel() for group in base.param_groups for param in group["params"])


def forget_history(base: Optimizer, total: int) -> None:
    """Restart optimizers that keep vectors over all parameters together (as LBFGS does).

    Such a history spans weights that a mask change has just removed.

    Args:
        total: numbers that the optimizer trained before the change.
    """
    for param, state in base.state.items():
        whole = [v for v in state.values() if isinstance(v, Tensor) and v.shape == (total,)]
        if whole and param.shape != (total,):
            state.clear()
    if getattr(base, "_numel_cache", None) is not None:
        base._numel_cache = None  # type: ignore[attr-defined]  # LBFGS counts its numbers once
