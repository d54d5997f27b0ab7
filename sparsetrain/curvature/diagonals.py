"""Sums of squared per-sample gradients, in the fastest way that is right.

A layer's short way is right when autograd's graph has no other use of its parameters than calls of
known layers, and when samples are along dimension 0 of what goes in and out. It is wrong where a
function uses the weight, too (a tied output projection), where a parametrization stands before it,
or a hook changes what the layer does. Such parameters take `vmap` over samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from sparsetrain.batches import Adapter, Batch, read
from sparsetrain.candidates import unwrapped
from sparsetrain.config import did_you_mean
from sparsetrain.curvature import layers, vmapped
from sparsetrain.curvature.attention import Attentions
from sparsetrain.curvature.graph import uses_of_parameters
from sparsetrain.curvature.losses import LossFunction, sample_losses
from sparsetrain.curvature.recording import Recording, Sums
from sparsetrain.evaluating import evaluating, wanting

Method = Literal["auto", "vmap", "loop"]
#: Numbers that per-sample gradients may take at a time.
BUDGET = 1 << 24


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
        #: Sums by the short way and by the long one.
        self.short: Sums = {}
        self.long: dict[str, Tensor] = {}
        self.attentions = Attentions(model)
        #: Layers that have a short way, and the parameters that need a long one.
        self.modules: dict[str, nn.Module] = {}
        self.slow: dict[str, Parameter] | None = None

    def add(self, batch: Batch, passes: Passes) -> None:
        """Add a batch."""
        if self.slow is None:
            # Not the size of the batch: a dimension as long as that must not pass for its samples.
            self.slow = self._need_a_long_way(batch.part(0, 1 if batch.size == 2 else 2))
        self.samples += batch.size
        done = []
        with wanting(self.model, ()), self.attentions.by_layers():
            left_out = self.slow.values()
            recording = Recording(
                self.model, self.modules, batch, self.budget, self.short, left_out
            )
            self.slow |= self._named(recording.without_samples)
            for one, is_last in _with_last(passes(recording.outputs, batch.targets)):
                done.append(one)
                self._go_back(recording, one, again=not is_last)
        for one in done if self.slow else ():
            for gradients in self._long(replace(batch, targets=one.targets), one.loss_fn):
                for name, gradient in gradients.items():
                    square = gradient.square().sum(0)  # the gradient may be expanded
                    self.long[name] = self.long[name].add_(square) if name in self.long else square

    def means(self) -> dict[str, Tensor]:
        """The sums over the number of samples; 0 for parameters that are not used. Ends it all."""
        return {name: self._sum(name, p).div_(self.samples) for name, p in self.parameters.items()}

    def _sum(self, name: str, parameter: Parameter) -> Tensor:
        found = [s for s in (self.short.get(parameter), self.long.get(name)) if s is not None]
        return sum(found[1:], found[0]) if found else torch.zeros_like(parameter)

    def _go_back(self, recording: Recording, one: Pass, *, again: bool) -> None:
        """A pass through the layers that have a short way."""
        if recording.uses:
            losses = sample_losses(one.loss_fn, recording.outputs, one.targets, recording.size)
            recording.go_back(losses.sum(), again=again)

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

    def _need_a_long_way(self, few: Batch) -> dict[str, Parameter]:
        """The parameters whose short way would leave something out, by a pass over few samples."""
        if self.method != "auto":
            return self.parameters
        wanted = {id(parameter) for parameter in self.parameters.values()}
        self.modules = {
            name: module
            for name, module in chain(self.model.named_modules(), self.attentions.layers.items())
            if layers.is_known(module)
            and any(id(p) in wanted for p in module.parameters(recurse=False))
        }
        with wanting(self.model, self.parameters.values()), self.attentions.by_layers():
            recording = Recording(self.model, self.modules, few, self.budget, {})
            in_graph = uses_of_parameters(recording.outputs)
        known = Counter(id(p) for use in recording.uses for p in use.parameters().values())
        without = {id(parameter) for parameter in recording.without_samples}
        return {
            name: p
            for name, p in self.parameters.items()
            if known[id(p)] != in_graph[id(p)] or id(p) in without
        }

    def _named(self, parameters: Iterable[Parameter]) -> dict[str, Parameter]:
        found = {id(parameter) for parameter in parameters}
        return {name: p for name, p in self.parameters.items() if id(p) in found}


def mean_squares(
    model: nn.Module,
    batches: Iterable[Any],
    passes: Passes,
    *,
    who: str,
    parameters: Iterable[str] | None,
    method: Method,
    adapter: Adapter | None,
    budget: int,
    progress: bool,
) -> tuple[dict[str, Tensor], int]:
    """Means over all samples of the squared gradients of some passes, and how many samples."""
    model = unwrapped(model)
    sums = SquareSums(model, chosen_parameters(model, parameters), method, budget)
    with evaluating(model):
        for batch in read(batches, model, who=who, adapter=adapter, progress=progress):
            sums.add(batch, passes)
    return sums.means(), sums.samples


def _with_last(passes: Iterable[Pass]) -> Iterator[tuple[Pass, bool]]:
    """Each pass, and whether it is the last."""
    before: Pass | None = None
    for one in passes:
        if before is not None:
            yield before, False
        before = one
    if before is not None:
        yield before, True
