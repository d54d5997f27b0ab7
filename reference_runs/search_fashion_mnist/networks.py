"""The network whose ratios are searched, its data, and what a search sees of a candidate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from reference_runs import _common as common
from reference_runs.channels_fashion_mnist.networks import BATCH, NETWORKS, RATE, fast, sgd
from reference_runs.channels_fashion_mnist.networks import data as whole_data
from sparsetrain.workbench import Dataset, Trainer, evaluate
from sparsetrain.workbench.training import EpochRecord

HERE = Path(__file__).parent
#: Weights of the trained networks; git ignores it.
CHECKPOINTS = HERE / "checkpoints"
NETWORK = "resnet"
EPOCHS = 3
HELD_OUT = 5_000  # training images that no network is trained on: the searches' validation set
EPOCH = (60_000 - HELD_OUT) // BATCH  # steps
SEEN = 1_500  # of them, that a search looks at
RECALIBRATION = 500  # training images for the statistics of batch normalisations
FINE_TUNING_STEPS, FINE_TUNING_RATE = 120, 0.02  # cosine to 0


@cache
def data() -> Dataset:
    """55,000 images to train on, and the test images."""
    every = whole_data()
    kept = slice(None, len(every.train_x) - HELD_OUT)
    return replace(every, train_x=every.train_x[kept], train_y=every.train_y[kept])


@cache
def validation() -> tuple[Tensor, Tensor]:
    """The images that were held out."""
    every = whole_data()
    return every.train_x[-HELD_OUT:], every.train_y[-HELD_OUT:]


def trained(seed: int, on_epoch: Callable[[EpochRecord], None] | None = None) -> nn.Module:
    """The trained network: from its file, or trained now."""
    path = CHECKPOINTS / f"{NETWORK}-{EPOCHS}-{seed}.pt"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = fast(NETWORKS[NETWORK].build())
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model
    train(model, sgd(model, RATE), EPOCHS * EPOCH, seed, on_epoch)
    common.save_weights(model, path)
    return model


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    seed: int,
    on_epoch: Callable[[EpochRecord], None] | None = None,
) -> None:
    """Train, the learning rate falling to 0 over all steps."""
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    trainer = Trainer(model, optimizer, data(), batch_size=BATCH, seed=seed, scheduler=scheduler)
    for record in trainer.run(steps):
        if on_epoch is not None:
            on_epoch(record)


def fine_tune(model: nn.Module, seed: int) -> None:
    """The same few steps for every pruned network."""
    train(model, sgd(model, FINE_TUNING_RATE), FINE_TUNING_STEPS, seed)


def recalibrated(model: nn.Module) -> nn.Module:
    """The network with the statistics of batch normalisations measured anew, in place."""
    update_bn(data().train_x[:RECALIBRATION].split(BATCH), fast(model))
    return model


def metric(model: nn.Module) -> float:
    """What a search sees: accuracy on validation images, after recalibration."""
    images, labels = validation()
    return evaluate(recalibrated(model), images[:SEEN], labels[:SEEN])


def test_error(model: nn.Module) -> float:
    """As a fraction."""
    return round(1 - evaluate(model, data().test_x, data().test_y), 4)
