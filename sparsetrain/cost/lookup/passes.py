"""How long whole networks take, and what of it passes in each layer and between layers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from sparsetrain.batches import called
from sparsetrain.convolution import CONVOLUTIONS, TRANSPOSED
from sparsetrain.cost.layers import LayerUse, layers_used
from sparsetrain.cost.lookup.layers import Storage
from sparsetrain.evaluating import evaluation_mode
from sparsetrain.storage.csr.layers import SparseLayer
from sparsetrain.timing import Clock, mean_seconds

_PRODUCTS = (nn.Linear, SparseLayer, *CONVOLUTIONS, *TRANSPOSED)
_SECONDS = 0.004  # that a network runs for in a round, at least


class Width(NamedTuple):
    """How large a use of a layer is in a network."""

    inputs: int
    outputs: int
    density: float
    storage: Storage


@dataclass(frozen=True)
class NetworkTime:
    """Seconds of a network's forward pass.

    Attributes:
        widths: of each use of a layer, in order.
        layers: seconds in each; None where it is no module of its own, as within attention.
        rests: seconds from the end of each to the begin of the next that was timed; 0 after None.
        before: seconds before the first that was timed.
        total: seconds of the network, measured without stopping the time in between.
    """

    widths: tuple[Width, ...]
    layers: tuple[float | None, ...]
    rests: tuple[float, ...]
    before: float
    total: float


class Sized(NamedTuple):
    """A network to time, and the uses of its layers with their storage."""

    model: nn.Module
    uses: list[LayerUse]
    storages: Sequence[Storage]


@torch.no_grad()
def network_seconds(
    networks: Sequence[Sized], example_inputs: Any, clock: Clock, rounds: int
) -> list[NetworkTime]:
    """Time networks in turn, each as it is and with the time stopped around its layers.

    Args:
        rounds: of which medians are taken.
    """
    passes = [_Pass(network, example_inputs, clock) for network in networks]
    with ExitStack() as modes:
        for network in networks:
            modes.enter_context(evaluation_mode(network.model))
        for each in passes:
            each.warm_up()
        for _ in range(rounds):
            for each in passes:
                each.run()
    return [each.result() for each in passes]


class _Pass:
    """A network that is run again and again."""

    def __init__(self, network: Sized, inputs: Any, clock: Clock) -> None:
        self.network, self.inputs, self.clock = network, inputs, clock
        named = network.model.named_modules()
        self.layers = [(name, module) for name, module in named if isinstance(module, _PRODUCTS)]
        self.calls = 1  # of a round
        self.totals: list[float] = []
        self.spans: list[list[float]] = []  # of each call: before, layer, rest, layer, rest ...
        self.names: list[str] = []  # of the layers, as they ran in the last call
        self.marks: list[Any] = []

    def warm_up(self) -> None:
        self._call()  # may compile or allocate
        seconds = max(mean_seconds(self._call, 1, self.clock), 1e-6)
        self.calls = math.ceil(_SECONDS / seconds)

    def run(self) -> None:
        self._call()  # what others have left in caches is no matter
        for _ in range(self.calls):  # in turn, since it takes many calls to fill large caches
            self.totals.append(mean_seconds(self._call, 1, self.clock))
            with self._watched():
                self.names.clear()
                self.marks = [self.clock.mark()]
                self._call()
                self.marks.append(self.clock.mark())
            self.spans.append(self.clock.spans(self.marks))

    def _call(self) -> None:
        called(self.network.model, self.inputs)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Marks before and after each layer. Hooks would take several times as long as this."""
        with ExitStack() as undo:
            for name, module in self.layers:
                self._watch(name, module, undo)
            yield

    def _watch(self, name: str, module: nn.Module, undo: ExitStack) -> None:
        forward, own = module.forward, vars(module).get("forward")

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.names.append(name)
            self.marks.append(self.clock.mark())
            out = forward(*args, **kwargs)
            self.marks.append(self.clock.mark())
            return out

        vars(module)["forward"] = watched
        if own is None:
            undo.callback(vars(module).pop, "forward")
        else:
            undo.callback(vars(module).update, forward=own)

    def result(self) -> NetworkTime:
        """Medians, laid out by the uses of layers."""
        before, *spans = (statistics.median(column) for column in zip(*self.spans, strict=True))
        timed = iter(zip(self.names, spans[::2], spans[1::2], strict=True))
        following = next(timed, None)
        layers: list[float | None] = []
        rests: list[float] = []
        for use in self.network.uses:
            if following is not None and following[0] == use.layer:
                layers.append(following[1])
                rests.append(following[2])
                following = next(timed, None)
            else:
                layers.append(None)
                rests.append(0.0)
        assert following is None  # every call of a module is a use
        pairs = zip(self.network.uses, self.network.storages, strict=True)
        widths = tuple(Width(u.inputs, u.outputs, u.density, storage) for u, storage in pairs)
        total = statistics.median(self.totals)
        return NetworkTime(widths, tuple(layers), tuple(rests), before, total)


def sized(model: nn.Module, example_inputs: Any) -> Sized:
    """A network with the uses of its layers."""
    uses = layers_used(model, example_inputs)
    return Sized(model, uses, [_storage(model.get_submodule(use.layer)) for use in uses])


def _storage(module: nn.Module) -> Storage:
    return "csr" if isinstance(module, SparseLayer) else "dense"
