"""The two networks whose channels are removed: how they are built, trained once, and kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsetrain as st
from reference_runs import _common as common
from sparsetrain.workbench import Dataset, Trainer, load
from sparsetrain.workbench.networks import ResidualBlock
from sparsetrain.workbench.training import EpochRecord

HERE = Path(__file__).parent
#: Weights of the trained networks; git ignores it.
CHECKPOINTS = HERE / "checkpoints"
BATCH = 100
RATE = 0.1  # of training; cosine to 0, a value a step
EPOCHS = 3
#: Of the penalty on the scales of batch normalisations, for the networks that slimming starts from.
STRENGTH = 1e-3


@dataclass(frozen=True)
class Network:
    """A network that is pruned."""

    label: str
    build: Callable[[], nn.Module]


@cache
def data() -> Dataset:
    """All 60,000 and 10,000 images, mean and standard deviation of the pixels taken out."""
    return load("fashion_mnist")


def _vgg() -> nn.Module:
    """Three pairs of convolutions, each before a pooling, and a linear layer (Simonyan 2015)."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    inputs = 1
    for number, width in enumerate((16, 16, 32, 32, 96, 96), start=1):
        layers[f"conv{number}"] = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
        layers[f"norm{number}"] = nn.BatchNorm2d(width)
        layers[f"relu{number}"] = nn.ReLU()
        if number % 2 == 0:
            layers[f"pool{number}"] = nn.MaxPool2d(2)
        inputs = width
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(96 * 3 * 3, 10)
    return nn.Sequential(layers)


class ResNet(nn.Module):
    """A stem of stride 2 and three stages of one residual block (He et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 32, 5, 2, 2, bias=False), nn.BatchNorm2d(32)
        self.block1 = ResidualBlock(32, 32, 1)
        self.block2 = ResidualBlock(32, 64, 2)
        self.block3 = ResidualBlock(64, 96, 2)
        self.fc = nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        x = self.block3(self.block2(self.block1(x)))
        return self.fc(x.mean((2, 3)))


NETWORKS = {"vgg": Network("VGG-style", _vgg), "resnet": Network("ResNet-style", ResNet)}


def built(network: str, seed: int) -> nn.Module:
    """The network before training, from the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return fast(NETWORKS[network].build())


def fast(model: nn.Module) -> nn.Module:
    """The model with its convolutions in the memory order that they are trained faster in."""
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _halve_scales(model: nn.Module) -> None:
    """Scales begin at 0.5, as in the authors' code."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 0.5)


def sgd(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """Nesterov's momentum."""
    return torch.optim.SGD(
        model.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=1e-4
    )


def begin(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> Trainer:
    """Training before its first step, the learning rate falling to 0 over all of it."""
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    return Trainer(model, optimizer, data(), batch_size=BATCH, seed=seed, scheduler=scheduler)


def trained(
    network: str,
    seed: int,
    *,
    slimming: bool = False,
    on_epoch: Callable[[EpochRecord], None] | None = None,
) -> nn.Module:
    """The trained network, with or without the penalty: from its file, or trained now."""
    path = CHECKPOINTS / f"{network}-{'slimming' if slimming else 'plain'}-{EPOCHS}-{seed}.pt"
    model = built(network, seed)
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model
    steps = EPOCHS * len(data().train_x) // BATCH
    optimizer = sgd(model, RATE)
    if slimming:
        _halve_scales(model)
        optimizer = st.SparseOptimizer(optimizer, model, st.Slimming(strength=STRENGTH))
    for record in begin(model, optimizer, steps, seed).run(steps):
        if on_epoch is not None:
            on_epoch(record)
    common.save_weights(model, path)
    return model
