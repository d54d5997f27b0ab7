"""What is timed: one training loop for each library, over the same network and batches."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import sparsetrain as st
from sparsetrain.workbench import Dataset, build

SPARSITY = 0.9
#: Mask updates never come due while steps are timed; the update benchmark forces them.
NEVER = 10**9

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, foreach=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-4),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-4, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-4, fused=True),
}


@dataclass(frozen=True)
class Workload:
    """A network, its batch size and the threads that serve it best."""

    network: str
    batch_size: int
    threads: int
    widths: tuple[int, ...] | None = None


WORKLOADS = {
    "LeNet-300-100": Workload("lenet_300_100", 100, 1),
    "MLP 784-2048-2048-10": Workload("mlp", 128, 2, (2048, 2048)),
    "ResNet, 3 stages": Workload("resnet_small", 64, 2),
}


@dataclass
class Contender:
    """A model in training under some library; `backward` and `step` are the loop's two halves."""

    model: nn.Module
    backward: Callable[[], None]
    step: Callable[[], None]
    handle: Any = None

    def train_step(self) -> None:
        """One step of training."""
        self.backward()
        self.step()


def batches(dataset: Dataset, size: int, count: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
    """The first `count` batches, over and over."""
    x = dataset.train_x[: size * count].split(size)
    y = dataset.train_y[: size * count].split(size)
    return cycle(list(zip(x, y, strict=True)))


def make(library: str, workload: Workload, optimizer: str, dataset: Dataset) -> Contender:
    """Build the network of the workload and train it with `library` (a key of LIBRARIES)."""
    model = build(
        workload.network, in_shape=dataset.in_shape, classes=10, seed=0, widths=workload.widths
    )
    stream = batches(dataset, workload.batch_size)
    return LIBRARIES[library](model, OPTIMIZERS[optimizer], stream)


Stream = Iterator[tuple[Tensor, Tensor]]
Factory = Callable[[Any], torch.optim.Optimizer]


def _backward(model: nn.Module, zero_grad: Callable[[], None], stream: Stream) -> None:
    x, y = next(stream)
    zero_grad()
    F.cross_entropy(model(x), y).backward()


def _bare(model: nn.Module, factory: Factory, stream: Stream) -> Contender:
    optimizer = factory(model.parameters())
    return Contender(
        model, lambda: _backward(model, optimizer.zero_grad, stream), lambda: optimizer.step()
    )


def _sparsetrain(model: nn.Module, factory: Factory, stream: Stream) -> Contender:
    policy = st.RigL(
        sparsity=SPARSITY,
        total_steps=2 * NEVER,
        update=st.UpdateSchedule(every=NEVER, start=NEVER - 1),
    )
    optimizer = st.SparseOptimizer(factory(model.parameters()), model, policy)
    return Contender(
        model,
        lambda: _backward(model, optimizer.zero_grad, stream),
        lambda: optimizer.step(),
        optimizer,
    )


def _rigl_torch(model: nn.Module, factory: Factory, stream: Stream) -> Contender:
    optimizer = factory(model.parameters())
    scheduler = _rigl_scheduler()(
        model,
        optimizer,
        dense_allocation=1 - SPARSITY,
        T_end=2 * NEVER,
        delta=NEVER,
        ignore_linear_layers=False,
    )

    def step() -> None:
        if scheduler():
            optimizer.step()

    return Contender(model, lambda: _backward(model, optimizer.zero_grad, stream), step, scheduler)


def _torch_prune(model: nn.Module, factory: Factory, stream: Stream) -> Contender:
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            prune.random_unstructured(module, "weight", SPARSITY)
    return _bare(model, factory, stream)


def _rigl_scheduler() -> Any:
    """rigl-torch's scheduler; it imports torchvision for two class names and nothing else."""
    if "torchvision" not in sys.modules:
        resnet = types.SimpleNamespace(Bottleneck=type(None), BasicBlock=type(None))
        stand_in: Any = types.ModuleType("torchvision")
        stand_in.models = types.SimpleNamespace(resnet=resnet)
        sys.modules["torchvision"] = stand_in
    from rigl_torch.RigL import RigLScheduler

    return RigLScheduler


LIBRARIES: dict[str, Callable[[nn.Module, Factory, Stream], Contender]] = {
    "bare optimizer": _bare,
    "sparsetrain": _sparsetrain,
    "rigl-torch": _rigl_torch,
    "torch.nn.utils.prune": _torch_prune,
}
