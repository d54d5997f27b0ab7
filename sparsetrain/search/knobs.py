"""What a search turns: a ratio for each layer, or for each group of layers that go together.

A `Pruning` says how ratios become a network. `bind` looks at a model once (scores are measured,
couplings are found) and gives its `Knobs`, which are then turned any number of times.
"""

from __future__ import annotations

import copy
import glob
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from sparsetrain.candidates import choose, unwrapped
from sparsetrain.config import did_you_mean
from sparsetrain.cost.budget import Budget
from sparsetrain.cost.layers import LayerUse, layers_used
from sparsetrain.cost.targets import CostTarget
from sparsetrain.policies import Policy, Static
from sparsetrain.recipe import Rule

_MOST = 1 - 1e-6  # of ratios for functions

#: Name of a knob -> share that is removed, in [0, 1); knobs that are left out stay as they are.
Ratios = Mapping[str, float]
#: Prunes a copy of the model by ratios, in place (returning None) or by returning another one.
PruneFunction = Callable[[nn.Module, Ratios], nn.Module | None]


@dataclass(frozen=True)
class Knob:
    """What has one ratio.

    Attributes:
        name: of the weight, or of the first layer of a coupling.
        size: weights or channels.
        layers: names of the modules whose inputs or outputs it changes.
        step: the least share by which it turns, 0 where any share will do.
    """

    name: str
    size: int
    layers: tuple[str, ...]
    step: float = 0.0


class Knobs(ABC):
    """A model and its knobs. The model stays as it is.

    Attributes:
        names: of the knobs, in the order of the model.
    """

    #: Whether what a network costs is a sum over knobs, none of which depends on another.
    adds_up: ClassVar[bool] = False

    def __init__(self, model: nn.Module, example_inputs: Any, knobs: Sequence[Knob]) -> None:
        self.model, self.example_inputs, self.knobs = model, example_inputs, tuple(knobs)
        self.names = tuple(knob.name for knob in knobs)
        if not knobs or len(set(self.names)) < len(knobs):
            raise ValueError(f"knobs need names, each another one: {', '.join(self.names)}")
        self._uses: list[LayerUse] | None = None

    @abstractmethod
    def network(self, ratios: Ratios) -> nn.Module:
        """A pruned copy of the model."""

    @abstractmethod
    def rounded(self, ratios: Ratios) -> dict[str, float]:
        """The ratios that `network` really has, of every knob; equal ones give equal networks."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What the networks depend on besides the model, as plain data."""

    def layers(self, ratios: Ratios) -> list[LayerUse]:
        """The layers that the pruned network uses. Quick where the network need not be built."""
        self.require_inputs()
        return layers_used(self.network(ratios), self.example_inputs)

    @property
    def uses(self) -> list[LayerUse]:
        """The layers of the model as it is.

        Raises:
            ValueError: there are no example inputs.
        """
        if self._uses is None:
            self.require_inputs()
            self._uses = layers_used(self.model, self.example_inputs)
        return self._uses

    def require_inputs(self) -> None:
        """Raise ValueError unless there are example inputs."""
        if self.example_inputs is None:
            raise ValueError("costs depend on the inputs: give example_inputs")

    def checked(self, ratios: Ratios) -> dict[str, float]:
        """A ratio for every knob, in their order.

        Raises:
            ValueError: an unknown name, or a ratio outside [0, 1).
        """
        for name, ratio in ratios.items():
            if name not in self.names:
                raise ValueError(f"ratio of {name!r}: no such knob{did_you_mean(name, self.names)}")
            if not 0 <= ratio < 1:
                raise ValueError(f"ratio {ratio} of {name!r} must be in [0, 1)")
        return {name: float(ratios.get(name, 0.0)) for name in self.names}

    def uniform(self, ratio: float) -> dict[str, float]:
        """The same ratio everywhere."""
        return dict.fromkeys(self.names, ratio)

    def ranked(self, share: float) -> dict[str, float]:
        """The ratios at which this share of all goes if all layers compete by their scores.

        Raises:
            ValueError: these knobs have no scores that can be compared.
        """
        raise ValueError(f"{type(self).__name__} have no scores that layers could compete by")

    def share(self, ratios: Ratios) -> float:
        """Share of all weights or channels that is removed."""
        real = self.rounded(ratios)
        gone = sum(real[knob.name] * knob.size for knob in self.knobs)
        return gone / sum(knob.size for knob in self.knobs)

    def policy(self, sparsity: float) -> Policy:
        """What prunes in a recipe of ratios, unless another policy is given."""
        return Static(sparsity=sparsity)

    def rules(self, ratios: Ratios) -> tuple[Rule, ...]:
        """The ratios as rules of a recipe; what is not pruned stays dense."""
        return tuple(
            Rule(match=glob.escape(name), sparsity=ratio)
            if ratio > 0
            else Rule(match=glob.escape(name), dense=True)
            for name, ratio in self.rounded(ratios).items()
        )

    def fingerprint(self) -> dict[str, Any]:
        """What evaluations depend on, as plain data: the model's state and the way of pruning."""
        digest = hashlib.sha256()
        for name, value in self.model.state_dict().items():
            digest.update(name.encode())
            if isinstance(value, torch.Tensor):
                digest.update(
                    value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                )
        knobs = [[knob.name, knob.size] for knob in self.knobs]
        return {"model": digest.hexdigest(), "knobs": knobs, "pruning": self.describe()}


class CostOf:
    """What the pruned network costs by a target's measure, for any ratios of some knobs.

    Attributes:
        target, whole, allowed: those of the budget.
    """

    def __init__(self, target: CostTarget | Mapping[str, Any], knobs: Knobs) -> None:
        self.budget, self.knobs = Budget.of(target, knobs.model, knobs.example_inputs), knobs
        self.target, self.whole = self.budget.target, self.budget.whole
        self.allowed = self.budget.allowed

    def __call__(self, ratios: Ratios) -> float:
        cost = self.budget.of_layers(lambda: self.knobs.layers(ratios))
        return self.budget.of_model(self.knobs.network(ratios)) if cost is None else cost

    def holds(self, ratios: Ratios) -> bool:
        """Whether the network may cost that."""
        return self.budget.holds(self(ratios))


class Pruning(ABC):
    """A way to prune by ratios."""

    @abstractmethod
    def bind(self, model: nn.Module, example_inputs: Any) -> Knobs:
        """Look at a model, which stays as it is."""


class FunctionKnobs(Knobs):
    """Knobs that a function of the user turns."""

    def __init__(
        self, function: PruneFunction, model: nn.Module, example_inputs: Any, names: Iterable[str]
    ) -> None:
        parts = {**dict(model.named_modules()), **dict(model.named_parameters())}
        super().__init__(model, example_inputs, [_knob(name, parts) for name in names])
        self.function = function

    def network(self, ratios: Ratios) -> nn.Module:
        """What the function makes of a copy."""
        copied = copy.deepcopy(self.model)
        made = self.function(copied, self.rounded(ratios))
        if made is not None and not isinstance(made, nn.Module):
            raise TypeError(f"the pruning function has to return a model or None, not {made!r}")
        return copied if made is None else made

    def rounded(self, ratios: Ratios) -> dict[str, float]:
        """To six decimals, which is also what the function gets."""
        return {name: min(round(r, 6), _MOST) for name, r in self.checked(ratios).items()}

    def describe(self) -> dict[str, Any]:
        """The function's name."""
        return {"function": getattr(self.function, "__qualname__", repr(self.function))}


def _knob(name: str, parts: Mapping[str, Any]) -> Knob:
    if name not in parts:
        raise ValueError(f"no layer or weight is called {name!r}{did_you_mean(name, parts)}")
    part = parts[name]
    if isinstance(part, nn.Module):
        return Knob(name, sum(p.numel() for p in part.parameters()), (name,))
    return Knob(name, part.numel(), (name.rpartition(".")[0],))


@dataclass(frozen=True)
class ByFunction(Pruning):
    """Prune by any function of ratios.

    Attributes:
        function: takes a copy of the model and a ratio for every name; changes the copy in place,
            or returns another model.
        names: of layers or weights that have a ratio each; all Linear and Conv weights that train
            when None.
    """

    function: PruneFunction
    names: Sequence[str] | None = None

    def bind(self, model: nn.Module, example_inputs: Any) -> FunctionKnobs:
        """Knobs for the names."""
        model = unwrapped(model)
        names = [c.name for c in choose(model, None)] if self.names is None else self.names
        return FunctionKnobs(self.function, model, example_inputs, names)
