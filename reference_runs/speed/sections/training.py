"""Networks in training under each way to hold the weights, for the sections that time steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

import sparsetrain as st
from reference_runs.speed.contenders import OPTIMIZERS
from sparsetrain.policies import Policy
from sparsetrain.storage.csr import kernels
from sparsetrain.workbench import build

Held = Literal["dense", "csr", "csr, torch kernels", "masked"]
CLASSES = 10
_BATCHES = 8


@dataclass(frozen=True)
class Network:
    """A multi-layer perceptron."""

    inputs: int
    widths: tuple[int, ...]

    def __str__(self) -> str:
        return "-".join(str(size) for size in (self.inputs, *self.widths, CLASSES))

    @property
    def last(self) -> str:
        """Name of the layer before the softmax, which stays dense."""
        return f"fc{len(self.widths) + 1}"

    def build(self) -> nn.Module:
        """The dense network, always with the same weights."""
        return build("mlp", in_shape=(self.inputs,), classes=CLASSES, widths=self.widths)

    def recipe(self, policy: Policy) -> st.Recipe:
        """The policy on all layers but the last, so that sparsity means what it says."""
        return st.Recipe(policy=policy, rules=(st.Rule(match=self.last, dense=True),))


NETWORKS = {
    "wide": Network(3072, (4096, 4096)),
    "narrow": Network(784, (1024, 1024)),
    "tiny": Network(64, (128, 128)),
}


@dataclass
class Training:
    """A network with its optimizer and one training step of it: from `zero_grad` to `step`."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: Callable[[], None]


def make(
    held: Held,
    network: Network,
    policy: Policy,
    optimizer: str,
    batch: int,
    *,
    batches: int = _BATCHES,
) -> Training:
    """Put the network into training on random data, its weights held as `held` says.

    Args:
        policy: not for "dense", which is torch alone.
        optimizer: a key of `OPTIMIZERS`.
    """
    model = network.build()
    base = OPTIMIZERS[optimizer](model.parameters())
    wrapped = base
    if held != "dense":
        storage = "masked" if held == "masked" else "csr"
        wrapped = st.SparseOptimizer(base, model, network.recipe(policy), storage=storage)
    step = step_of(model, wrapped, network.inputs, batch, batches)
    return Training(model, wrapped, with_torch_kernels(step) if "torch" in held else step)


def step_of(
    model: nn.Module, optimizer: Any, inputs: int, batch: int, batches: int
) -> Callable[[], None]:
    """A whole training step, over and over on a few random batches."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batches * batch, inputs, generator=generator)
    y = torch.randint(CLASSES, (batches * batch,), generator=generator)
    stream = cycle(list(zip(x.split(batch), y.split(batch), strict=True)))

    def step() -> None:
        x, y = next(stream)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def with_torch_kernels(job: Callable[[], Any]) -> Callable[[], Any]:
    """The job as it is without numba."""

    def without_numba() -> Any:
        with kernels.using("torch"):
            return job()

    return without_numba


def uniform(sparsity: float) -> Policy:
    """A random mask of that sparsity in every layer, for good."""
    return st.Static(sparsity=sparsity, allocation=st.Uniform())


def check_held(training: Training, held: Held, sparsity: float) -> None:
    """Refuse to time another sparsity, or another way to hold weights, than what is written down.

    Raises:
        ValueError: naming the layer.
    """
    storage = "masked" if held == "masked" else "csr"
    for name, target in getattr(training.optimizer, "targets", {}).items():
        if target.storage != storage:
            raise ValueError(f"{name} is held as {target.storage}, not as {storage}")
        if not math.isclose(target.density, 1 - sparsity, abs_tol=1e-4):
            raise ValueError(f"{name} has density {target.density}, not {1 - sparsity}")
