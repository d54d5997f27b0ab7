"""Measuring what a plan asks for, part by part, so that it can be interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sparsetrain.batches import called
from sparsetrain.cost.lookup.layers import Shape, layer_seconds
from sparsetrain.cost.lookup.networks import narrower, with_sparsity
from sparsetrain.cost.lookup.passes import NetworkTime, Sized, network_seconds, sized
from sparsetrain.cost.lookup.plan import Plan
from sparsetrain.cost.lookup.prediction import Prediction
from sparsetrain.cost.lookup.uses import Measured
from sparsetrain.evaluating import evaluation_mode
from sparsetrain.report.progress import tracked
from sparsetrain.storage.csr.layers import SparseLayer
from sparsetrain.timing import clock_of

_NETWORK_ROUNDS = 3  # of whole networks, for each round of layers

#: What has been measured so far: shapes, then networks.
Parts = tuple[tuple[Measured, ...], tuple[NetworkTime, ...]]


def measuring(
    plan: Plan, done: Parts, model: nn.Module, example_inputs: Any, rounds: int, progress: bool
) -> Iterator[Parts]:
    """What has been measured, after each shape and after the networks; `done` is not repeated."""
    layers, networks = done
    clock = clock_of(torch.device(plan.setting.device))
    missing: list[Shape | None] = [*plan.shapes[len(layers) :]]
    missing += [] if networks else [None]
    for shape in tracked(missing, "latency table", progress=progress):
        if shape is None:
            chosen = _networks(plan, layers, model, example_inputs)
            found = network_seconds(chosen, example_inputs, clock, _NETWORK_ROUNDS * rounds)
            yield layers, tuple(found)
            continue
        wanted = plan.cases(shape)
        with evaluation_mode(model):
            run = _pass(model, example_inputs)
            times = layer_seconds(shape, wanted, run, plan.setting, clock, rounds)
        layers = (*layers, Measured(shape, wanted, *times))
        yield layers, networks


def _networks(
    plan: Plan, measured: tuple[Measured, ...], model: nn.Module, example_inputs: Any
) -> list[Sized]:
    """The model, narrower ones, and sparse ones in the storages that their layers suggest."""
    models = [model]
    if not any(isinstance(module, SparseLayer) for module in model.modules()):
        models += narrower(model, example_inputs, plan.step, plan.channels_last)
        layers = Prediction(plan, measured, ())
        for sparsity in plan.sparsities if "csr" in plan.storages else ():
            uses = [replace(layer, density=1 - sparsity) for layer in plan.layers]
            pairs = zip(uses, layers.storages(uses), strict=True)
            held = list(dict.fromkeys(use.layer for use, storage in pairs if storage == "csr"))
            # All of them; and every second one, since what comes before a layer matters to it.
            for some in (held, held[::2], held[1::2])[: 3 if len(held) > 1 else 1]:
                if some:
                    models.append(with_sparsity(model, dict.fromkeys(some, sparsity)))
    return [sized(each, example_inputs) for each in models]


def _pass(model: nn.Module, example_inputs: Any) -> Callable[[], None]:
    @torch.no_grad()
    def run() -> None:
        called(model, example_inputs)

    return run
