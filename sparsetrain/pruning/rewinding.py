"""Rewinding: everything that training depends on, as it was at some step."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from sparsetrain.base_state import zero_inactive_state
from sparsetrain.candidates import unwrapped
from sparsetrain.optimizer import SparseOptimizer


@dataclass(frozen=True)
class Snapshot:
    """Weights, buffers, random generators, and the state of whatever else training keeps.

    Attributes:
        model: the model's state dict.
        states: of the optimizer, schedulers, generators..., in the order in which they were given.
        random: of torch's, Python's and numpy's global generators.
    """

    model: dict[str, Tensor]
    states: list[Any]
    random: dict[str, Any]

    @classmethod
    def take(cls, model: nn.Module, *stateful: Any) -> Snapshot:
        """Copy the state of a model and of what trains it.

        Args:
            stateful: optimizers, schedulers, gradient scalers, a `torch.Generator`, or anything
                with `state_dict` and `load_state_dict`.
        """
        states = [_copied(_state_of(part)) for part in stateful]
        return cls(_copied(unwrapped(model).state_dict()), states, random_state())

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `torch.save`, which loads with weights_only."""
        return {"model": self.model, "states": self.states, "random": self.random}


def rewind(snapshot: Snapshot, model: nn.Module, *stateful: Any) -> None:
    """Put a model and what trains it back to where they were.

    What a `SparseOptimizer` prunes now stays pruned: weights and optimizer state are rewound, and
    are 0 where its masks say so.

    Args:
        stateful: the same kinds of objects in the same order as in `Snapshot.take`; none rewinds
            the model and the global generators alone.

    Raises:
        ValueError: the model or the objects are others than those of the snapshot; the model is
            then as it was.
    """
    model = unwrapped(model)
    _check(model.state_dict(), snapshot.model)
    if stateful and len(stateful) != len(snapshot.states):
        raise ValueError(
            f"the snapshot has the states of {len(snapshot.states)} objects (optimizer, "
            f"scheduler, ...), not of {len(stateful)}: give the same ones"
        )
    for part, state in zip(stateful, snapshot.states, strict=False):
        _load(part, _copied(state))
    model.load_state_dict(snapshot.model)
    for part in stateful:
        if isinstance(part, SparseOptimizer):
            part.apply_masks()
    set_random_state(snapshot.random)


def random_state() -> dict[str, Any]:
    """State of the global generators, as plain data."""
    kind, keys, *rest = numpy.random.get_state()  # noqa: NPY002  users' data may depend on it
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(numpy.asarray(keys).astype("int64")), *rest],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Inverse of `random_state`."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"]])
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    numpy.random.set_state((kind, keys.numpy().astype("uint32"), *rest))  # noqa: NPY002


def _state_of(part: Any) -> Any:
    if isinstance(part, torch.Generator):
        return part.get_state()
    if isinstance(part, SparseOptimizer):
        return part.base.state_dict()  # masks are not rewound
    if not hasattr(part, "state_dict") or not hasattr(part, "load_state_dict"):
        raise ValueError(
            f"a {type(part).__name__} has no state_dict and load_state_dict, so that it cannot "
            "be rewound"
        )
    return part.state_dict()


def _load(part: Any, state: Any) -> None:
    if isinstance(part, torch.Generator):
        part.set_state(state)
    elif isinstance(part, SparseOptimizer):
        part.base.load_state_dict(state)
        for target in part.targets.values():
            zero_inactive_state(part.base, target)
    else:
        part.load_state_dict(state)


def _copied(value: Any) -> Any:
    """A copy that later training does not change."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_copied(entry) for entry in value])
    return value


def _check(own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless a state dict fits a model."""
    strangers: Sequence[str] = sorted(own.keys() ^ saved.keys())
    if strangers:
        raise ValueError(
            f"the snapshot is of another model: {', '.join(strangers[:5])} is in one of both alone"
        )
    for name, tensor in own.items():
        if tensor.shape != saved[name].shape:
            raise ValueError(
                f"the snapshot is of another model: {name} has shape {tuple(saved[name].shape)} "
                f"there and {tuple(tensor.shape)} here"
            )
