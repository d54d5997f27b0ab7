"""Machines whose times are known functions, for tests of latency tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import sparsetrain as st
from sparsetrain.cost.layers import LayerUse
from sparsetrain.cost.lookup import layers, measuring
from sparsetrain.cost.lookup.layers import Case, LayerJob
from sparsetrain.cost.lookup.passes import NetworkTime, Sized, Width, sized


@dataclasses.dataclass
class FakeMachine:
    """Seconds as functions.

    Attributes:
        model: for which tables are made.
        x: what goes into it.
        alone: seconds of a layer by itself.
        colder: times that a layer takes longer in a network.
        extra: seconds that it takes longer.
        colder_after_csr: times that it takes longer after a sparse layer.
        rest: seconds after a use of a layer, of its outputs and storage.
        before: seconds before the first layer.
        speeds: of parts of the measuring, in turn; 2 takes twice as long.
        stop_after: parts, after which the measuring is interrupted.
        measured: every case that was asked for.
        networks: that were timed.
    """

    model: nn.Module
    x: torch.Tensor
    alone: Callable[[LayerUse, Case], float]
    colder: float = 1.0
    extra: float = 0.0
    colder_after_csr: float = 1.0
    rest: Callable[[int, str], float] = lambda outputs, storage: 0.0
    before: float = 0.0
    speeds: Sequence[float] = ()
    stop_after: int = 1000
    measured: list[Case] = dataclasses.field(default_factory=list)
    networks: list[Sized] = dataclasses.field(default_factory=list)
    parts: int = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
        monkeypatch.setattr(layers, "median_seconds", self._medians)
        monkeypatch.setattr(measuring, "network_seconds", self._network_seconds)
        return self

    def time(self, network: Sized) -> NetworkTime:
        """What a network takes."""
        inside, rests, widths, after = [], [], [], False
        for use, storage in zip(network.uses, network.storages, strict=True):
            case = Case(storage, after, use.inputs, use.outputs, 1 - use.density)
            factor = self.colder * (self.colder_after_csr if after else 1)
            inside.append(factor * self.alone(use, case) + self.extra)
            rests.append(self.rest(use.outputs, storage))
            widths.append(Width(use.inputs, use.outputs, use.density, storage))
            after = storage == "csr"
        total = self.before + sum(inside) + sum(rests)
        return NetworkTime(tuple(widths), tuple(inside), tuple(rests), self.before, total)

    def seconds(self, model: nn.Module) -> float:
        """What a model takes."""
        return self.time(sized(model, self.x)).total

    def _medians(self, jobs: Sequence[Any], clock: Any, **_: Any) -> list[float]:
        if self.parts == self.stop_after:
            raise KeyboardInterrupt
        speed = self.speeds[self.parts] if self.speeds else 1.0
        self.parts += 1
        times = [speed * self.seconds(self.model)]
        for job in jobs:
            job()  # which has to run
            if isinstance(job, LayerJob):
                self.measured.append(job.case)
                times.append(speed * self.alone(job.shape.use, job.case))
        return times

    def _network_seconds(self, networks: Sequence[Sized], *_: Any) -> list[NetworkTime]:
        if self.parts == self.stop_after:
            raise KeyboardInterrupt
        self.networks = list(networks)
        return [self.time(network) for network in networks]


X = torch.randn(3, 20)
SPARSITIES = (0.5, 0.9)


def network(width: int = 28) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, width), nn.ReLU(), nn.Linear(width, 10))


def curved(use: LayerUse, case: Case) -> float:
    """Not linear between the points of a grid; csr costs what its non-zeros cost."""
    if case.storage == "csr":
        seconds = 300 + 20 * (1 - case.sparsity) * case.inputs * case.outputs
        return 1e-6 * seconds * (1 if case.after_csr else 2)
    return 1e-6 * (100 + case.inputs**2 * case.outputs) * (3 if case.after_csr else 1)


def table_of(machine: FakeMachine, **options) -> st.cost.LatencyTable:
    options = {"sparsities": SPARSITIES, **options}
    return st.cost.latency_table(machine.model, machine.x, **options)


def first(inputs: int, outputs: int, density: float = 1.0) -> LayerUse:
    return LayerUse("0.weight", "0", "linear", inputs, outputs, density=density)
