"""Sums of squared per-sample gradients, in the fastest way that is right.

Which way is right is found out once, on two samples: a layer's short way has to give what autograd
gives one sample at a time. It does not where a function uses the weight, too (a tied output
projection), where a parametrization stands before it, or where samples are not along dimension 0.
Such parameters take `vmap` over samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils.parametrize import is_parametrized

from sparsetrain.batches import Batch
from sparsetrain.config import did_you_mean
from sparsetrain.curvature import layers, vmapped
from sparsetrain.curvature.evaluating import wanting
from sparsetrain.curvature.losses import LossFunction, sample_losses
from sparsetrain.curvature.recording import Recording

Method = Literal["auto", "vmap", "loop"]
#: Numbers that per-sample gradients may take at a time.
BUDGET = 1 << 24
#: Of the norm. A ReLU at its kink differs between batch sizes; wrong ways differ by far more.
_TOLERANCE = 0.05


class Diagonal(dict[str, Tensor]):
    """Parameter name -> diagonal of a curvature matrix, of the parameter's shape.

    Attributes:
        curvature: which matrix it is of.
        samples: how many it is the mean over.
    """

    def __init__(self, values: dict[str, Tensor], curvature: str, samples: int) -> None:
        super().__init__(values)
        self.curvature = curvature
        self.samples = samples


class Pass(NamedTuple):
    """A function of the outputs whose gradient is squared, sample by sample."""

    loss_fn: LossFunction
    targets: Any


#: (outputs, targets of the batch) -> the passes that a batch takes.
Passes = Callable[[Any, Any], Iterable[Pass]]


def chosen_parameters(model: nn.Module, names: Iterable[str] | None) -> dict[str, Parameter]:
    """The parameters of these names; all that train when there are none.

    Raises:
        ValueError: a name that the model does not have, or no parameter.
    """
    every = dict(model.named_parameters())
    if names is None:
        found = {name: p for name, p in every.items() if p.requires_grad}
        if not found:
            raise ValueError("the model has no parameter that trains: give `parameters` by name")
        return found
    wanted = list(names)
    for name in wanted:
        if name not in every:
            raise ValueError(f"the model has no parameter {name!r}{did_you_mean(name, every)}")
    return {name: every[name] for name in wanted}


class SquareSums:
    """Collects sums over samples of squared gradients, a batch at a time.

    Args:
        model: in evaluation mode.
        parameters: name -> parameter to collect for.
        method: "auto" takes the short way where it is right, "vmap" and "loop" never do.
        budget: numbers that per-sample gradients may take at a time.
    """

    def __init__(
        self, model: nn.Module, parameters: dict[str, Parameter], method: Method, budget: int
    ) -> None:
        self.model = model
        self.parameters = parameters
        self.method = method
        self.budget = budget
        self.samples = 0
        self.sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
        #: Layers that have a short way, and the parameters that need a long one.
        self.modules: dict[str, nn.Module] = {}
        self.slow: dict[str, Parameter] | None = None

    def add(self, batch: Batch, passes: Passes) -> None:
        """Add a batch."""
        if self.slow is None:
            self.slow = self._need_a_long_way(batch.part(0, 2), passes)
        self.samples += batch.size
        done = []
        with wanting(self.model, ()):
            recording = Recording(self.model, self.modules, batch, self.budget)
            for one, is_last in _with_last(passes(recording.outputs, batch.targets)):
                done.append(one)
                for name, square in self._short(recording, one, again=not is_last).items():
                    if name not in self.slow:
                        self.sums[name] += square
        for one in done if self.slow else ():
            for gradients in self._long(replace(batch, targets=one.targets), one.loss_fn):
                for name, gradient in gradients.items():
                    self.sums[name] += gradient.square().sum(0)  # it may be expanded

    def means(self) -> dict[str, Tensor]:
        """The sums over the number of samples."""
        return {name: total / self.samples for name, total in self.sums.items()}

    def _short(self, recording: Recording, one: Pass, *, again: bool = False) -> dict[str, Tensor]:
        """Sums of squares by layers, for the parameters that are wanted."""
        if not recording.uses:
            return {}
        losses = sample_losses(one.loss_fn, recording.outputs, one.targets, recording.size)
        found = recording.sums_of_squares(losses.sum(), again=again)
        return {name: found[p] for name, p in self.parameters.items() if p in found}

    def _long(self, batch: Batch, loss_fn: LossFunction) -> Iterator[dict[str, Tensor]]:
        """Per-sample gradients of the parameters that have no short way."""
        assert self.slow is not None
        if self.method == "loop":
            return self._looped(self.slow, batch, loss_fn)
        return vmapped.gradients_of(self.model, self.slow, batch, loss_fn, self.budget)

    def _looped(
        self, parameters: dict[str, Parameter], batch: Batch, loss_fn: LossFunction
    ) -> Iterator[dict[str, Tensor]]:
        with wanting(self.model, parameters.values()):
            yield from vmapped.looped_gradients(self.model, parameters, batch, loss_fn)

    def _need_a_long_way(self, few: Batch, passes: Passes) -> dict[str, Parameter]:
        """The parameters whose short way does not give what autograd gives on two samples."""
        if self.method != "auto":
            return self.parameters
        wanted = {id(parameter) for parameter in self.parameters.values()}
        self.modules = {
            name: module
            for name, module in self.model.named_modules()
            if layers.is_known(module)
            and not is_parametrized(module)
            and any(id(p) in wanted for p in module.parameters(recurse=False))
        }
        with wanting(self.model, ()):
            recording = Recording(self.model, self.modules, few, self.budget)
            one = next(iter(passes(recording.outputs, few.targets)))
            short = self._short(recording, one)
        right = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        few = replace(few, targets=one.targets)
        for gradients in self._looped(self.parameters, few, one.loss_fn):
            for name, gradient in gradients.items():
                right[name] += gradient.square().sum(0)
        return {
            name: self.parameters[name]
            for name, value in right.items()
            if not _agree(short.get(name), value)
        }


def _with_last(passes: Iterable[Pass]) -> Iterator[tuple[Pass, bool]]:
    """Each pass, and whether it is the last."""
    before: Pass | None = None
    for one in passes:
        if before is not None:
            yield before, False
        before = one
    if before is not None:
        yield before, True


def _agree(short: Tensor | None, right: Tensor) -> bool:
    size = right.norm()
    if short is None:
        return not size  # a parameter that is not used
    return bool((short - right).norm() <= _TOLERANCE * size)
