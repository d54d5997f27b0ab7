"""SET in networks so wide that their dense form would fill terabytes, resumable at any step.

**Start and learning rates.** With ten inputs a neuron the start that `nn.Linear` has (uniform
within 1 / sqrt(inputs)) keeps a sixth of the signal a layer after ReLU, so three layers keep next
to nothing; here hidden weights are uniform within sqrt(6 / inputs), which keeps it all (He et al.
2015, "Delving deep into rectifiers", equation 10). A hidden neuron has ten connections on either
side however wide the network is, so one learning rate serves hidden layers of any width. The last
layer sums over all neurons: what one gradient step changes in its output grows with the width, and
its learning rate is divided by it. The loss then falls alike at 10^3 and at 10^6 neurons.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import sparsetrain as st
from reference_runs import _common as common
from sparsetrain.keeping import whole_file
from sparsetrain.storage.csr.layers import SparseLinear
from sparsetrain.workbench import Dataset

INPUTS, HIDDEN, CLASSES = 784, 3, 10
MOMENTUM = 0.9
_GAIN = 6**0.5  # from uniform within 1 / sqrt(inputs) to within sqrt(6 / inputs)
_FOREVER = 10**9


@dataclass(frozen=True)
class Settings:
    """What a run is; a checkpoint of one does not fit another.

    Attributes:
        width: neurons in each of the three hidden layers.
        connections: inputs of a hidden neuron, on average.
        batch: samples a step.
        rate: learning rate of the hidden layers.
        every: steps from one SET update to the next; 0 for none.
        seed: of places, weights and the order of samples.
    """

    width: int
    connections: int = 10
    batch: int = 32
    rate: float = 0.3
    every: int = 50
    seed: int = 0


def network(settings: Settings) -> nn.Sequential:
    """784 -> width -> width -> width -> 10; nothing of it ever exists densely.

    The last layer has all its connections: its ten classes give each neuron ten.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    sizes = [INPUTS, *[settings.width] * HIDDEN, CLASSES]
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for number, (fan_in, fan_out) in enumerate(pairwise(sizes), start=1):
        hidden = number <= HIDDEN
        density = min(1.0, settings.connections / fan_in) if hidden else 1.0
        layer = SparseLinear(fan_in, fan_out, density, generator=generator)
        _start(layer, _GAIN if hidden else 1.0)
        layers[f"fc{number}"] = layer
        if hidden:
            layers[f"relu{number}"] = nn.ReLU()
    return nn.Sequential(layers)


@torch.no_grad()
def _start(layer: SparseLinear, gain: float) -> None:
    layer.values.mul_(gain)
    layer.bias.zero_()


def wrap(model: nn.Sequential, settings: Settings) -> st.SparseOptimizer:
    """SGD with momentum, and SET on the hidden layers."""
    last = f"fc{HIDDEN + 1}"
    of_last = list(model.get_submodule(last).parameters())
    hidden = [p for p in model.parameters() if all(p is not other for other in of_last)]
    values, bias = of_last
    groups = [
        {"params": [*hidden, bias]},
        {"params": [values], "lr": settings.rate / settings.width},
    ]
    base = torch.optim.SGD(groups, lr=settings.rate, momentum=MOMENTUM, fused=True)
    every = settings.every or _FOREVER - 1
    policy = st.SET(
        allocation="as_built",
        total_steps=_FOREVER,
        update=st.UpdateSchedule(every=every, start=every),
    )
    recipe = st.Recipe(policy=policy, rules=(st.Rule(match=last, dense=True),))
    return st.SparseOptimizer(base, model, recipe, seed=settings.seed, storage="csr")


@dataclass
class Run:
    """A network in training, with the loss and the seconds of each step so far."""

    settings: Settings
    dataset: Dataset
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def __post_init__(self) -> None:
        self.model = network(self.settings)
        self.optimizer = wrap(self.model, self.settings)

    @property
    def nonzeros(self) -> int:
        """Weights held, those of the last layer too."""
        layers = [m for m in self.model if isinstance(m, SparseLinear)]
        return sum(layer.pattern.nnz for layer in layers)

    @property
    def weights(self) -> int:
        """Weights that the same network would have densely."""
        layers = [m for m in self.model if isinstance(m, SparseLinear)]
        return sum(layer.in_features * layer.out_features for layer in layers)

    def step(self) -> float:
        """One training step; returns its loss."""
        started = time.perf_counter()
        # Seeded afresh each step: a resumed run needs no generator's state, only the step.
        seed = self.settings.seed * 1_000_003 + len(self.losses)
        generator = torch.Generator().manual_seed(seed)
        index = torch.randint(
            len(self.dataset.train_x), (self.settings.batch,), generator=generator
        )
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(self.dataset.train_x[index]), self.dataset.train_y[index])
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - started)
        return self.losses[-1]

    def save(self, path: Path) -> None:
        """Write a checkpoint, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "settings": asdict(self.settings),
            "losses": self.losses,
            "seconds": self.seconds,
            "peak_bytes": self.peak_bytes,
            "optimizer": self.optimizer.state_dict(),
            "model": self.model.state_dict(),
        }
        with whole_file(path) as partial:
            torch.save(state, partial)

    def load(self, path: Path) -> None:
        """Go on where a checkpoint left off.

        Raises:
            ValueError: it is of a run with other settings.
        """
        state: dict[str, Any] = torch.load(path, weights_only=True)
        if state["settings"] != asdict(self.settings):
            raise ValueError(
                f"{path} was written with {state['settings']}, and this run has "
                f"{asdict(self.settings)}: give the same, or --fresh"
            )
        # The optimizer first: it makes the layers hold the places that the weights are for.
        self.optimizer.load_state_dict(state["optimizer"])
        self.model.load_state_dict(state["model"])
        self.losses, self.seconds = state["losses"], state["seconds"]
        self.peak_bytes = state["peak_bytes"]

    def record(self, accuracy: float, samples: int) -> common.Record:
        """What is written down at the end."""
        return {
            **asdict(self.settings),
            "nonzeros": self.nonzeros,
            "weights": self.weights,
            "steps": len(self.losses),
            "first_loss": round(common.mean(self.losses[:20]), 4),
            "last_loss": round(common.mean(self.losses[-20:]), 4),
            "test_accuracy": accuracy,
            "test_samples": samples,
            "seconds_a_step": round(common.mean(self.seconds), 5),
            "seconds_between_updates": round(_median_between_updates(self), 5),
            "peak_bytes": self.peak_bytes,
            "losses": [round(loss, 4) for loss in self.losses],
        }


def _median_between_updates(run: Run) -> float:
    every = run.settings.every
    plain = [t for n, t in enumerate(run.seconds) if n == 0 or not every or n % every]
    return float(torch.tensor(plain).median())
