"""The networks that are pruned: how they are built, trained once, and kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import nn

from reference_runs import _common as common
from sparsetrain.workbench import Dataset, Trainer, build, load
from sparsetrain.workbench.training import EpochRecord

HERE = Path(__file__).parent
#: Weights of the trained networks; git ignores it.
CHECKPOINTS = HERE / "checkpoints"
BATCH = 100
RATE = 0.1  # of training; cosine to 0, a value a step
SPARSITIES = (0.50, 0.70, 0.80, 0.90, 0.95)


@dataclass(frozen=True)
class Network:
    """A network and its budget.

    Attributes:
        build: seed -> the network before training.
        epochs: of training, before anything is pruned.
        fine_tuned: the sparsities at which pruned networks train on.
    """

    label: str
    build: Callable[[int], nn.Module]
    epochs: int
    fine_tuned: tuple[float, ...] = SPARSITIES


@cache
def data() -> Dataset:
    """All 60,000 and 10,000 images, mean and standard deviation of the pixels taken out."""
    return load("fashion_mnist")


def _lenet_300_100(seed: int) -> nn.Module:
    return build("lenet_300_100", in_shape=data().in_shape, classes=10, seed=seed)


def _cnn(seed: int) -> nn.Module:
    """Three convolutions of stride 2 with batch norm, 28 x 28 to 4 x 4, and a linear layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(1, 16, 5, stride=2, padding=2, bias=False),
                norm1=nn.BatchNorm2d(16),
                relu1=nn.ReLU(),
                conv2=nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
                norm2=nn.BatchNorm2d(32),
                relu2=nn.ReLU(),
                conv3=nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False),
                norm3=nn.BatchNorm2d(64),
                relu3=nn.ReLU(),
                flatten=nn.Flatten(),
                fc=nn.Linear(64 * 4 * 4, 10),
            )
        )


#: An epoch of the CNN takes three times as long, so it is fine-tuned at fewer sparsities.
NETWORKS = {
    "lenet_300_100": Network("LeNet-300-100", _lenet_300_100, epochs=20),
    "cnn": Network("CNN", _cnn, epochs=6, fine_tuned=(0.70, 0.90, 0.95)),
}


def sgd(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """Nesterov's momentum, as in `lenet_fashion_mnist`."""
    return torch.optim.SGD(
        model.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=1e-4
    )


def begin(model: nn.Module, optimizer: torch.optim.Optimizer, epochs: int, seed: int) -> Trainer:
    """Training before its first step, the learning rate falling to 0 over all of it."""
    steps = epochs * len(data().train_x) // BATCH
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    return Trainer(model, optimizer, data(), batch_size=BATCH, seed=seed, scheduler=scheduler)


def trained(
    network: str, seed: int, on_epoch: Callable[[EpochRecord], None] | None = None
) -> nn.Module:
    """The trained network: from its file, or trained now and put there."""
    chosen = NETWORKS[network]
    path = CHECKPOINTS / f"{network}-{chosen.epochs}-{seed}.pt"
    model = chosen.build(seed)
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model
    trainer = begin(model, sgd(model, RATE), chosen.epochs, seed)
    for record in trainer.run(chosen.epochs * trainer.steps_per_epoch):
        if on_epoch is not None:
            on_epoch(record)
    common.save_weights(model, path)
    return model
