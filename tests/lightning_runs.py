"""The small network of `runs.py` in a LightningModule, and the loop that Lightning stands for."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from runs import OPTIMIZERS, POLICIES, STEPS, SmallNet, batch, same, weights
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import sparsetrain as st

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

EPOCHS = 2
BATCHES = STEPS // EPOCHS
_CHANGING: dict[str, Any] = {"sparsity": 0.5, "total_steps": STEPS, "update": {"every": 2}}
LEARNED: dict[str, st.Policy] = {
    "soft_threshold": st.SoftThreshold(**_CHANGING),
    "hard_concrete": st.HardConcrete(**_CHANGING),
    "gumbel_softmax": st.GumbelSoftmax(**_CHANGING),
    "variational_dropout": st.VariationalDropout(**_CHANGING),
    "movement": st.Movement(**_CHANGING),
    "soft_movement": st.Movement(mode="threshold", **_CHANGING),
}
ALL = {**POLICIES, **LEARNED}


def sparse(net: nn.Module, policy: str, **options: Any) -> st.SparseOptimizer:
    """The optimizer of every run: SGD for masks that policies change, Adam for learned ones."""
    base = OPTIMIZERS["adam" if policy in LEARNED else "momentum"](net.parameters())
    return st.SparseOptimizer(base, net, ALL[policy], **options)


class Net(pl.LightningModule):
    """Trains a `SmallNet`, its weights held as `policy` says; noise is that of the batch."""

    def __init__(self, policy: str, **options: Any) -> None:
        super().__init__()
        self.policy, self.options = policy, options
        self.net = SmallNet()

    def configure_optimizers(self) -> Any:
        return sparse(self.net, self.policy, **self.options)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(batch_idx)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))


class Early(Net):
    """Wraps its optimizer before Lightning loads weights or sets up data-parallel training."""

    optimizer: st.SparseOptimizer | None = None

    def configure_model(self) -> None:
        if self.optimizer is None:
            self.optimizer = sparse(self.net, self.policy, **self.options)

    def configure_optimizers(self) -> Any:
        return self.optimizer


def data(batches: int = BATCHES) -> DataLoader[Any]:
    """The batches of an epoch, always the same."""
    xs, ys = zip(*(batch(step) for step in range(batches)), strict=True)
    return DataLoader(TensorDataset(torch.cat(xs), torch.cat(ys)), batch_size=8)


def trainer_of(folder: Path, *callbacks: Any, **options: Any) -> pl.Trainer:
    """A quiet `Trainer` on the CPU."""
    usual: dict[str, Any] = {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": EPOCHS,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**usual, **options})


def sparse_of(trainer: pl.Trainer, number: int = 0) -> st.SparseOptimizer:
    """The optimizer of a `Trainer`."""
    optimizer = trainer.optimizers[number]
    assert isinstance(optimizer, st.SparseOptimizer)
    return optimizer


def saving(folder: Path, *callbacks: Any, **options: Any) -> pl.Trainer:
    """One that saves a checkpoint an epoch, epoch=0.ckpt and so on."""
    saves = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    return trainer_of(folder, *callbacks, saves, enable_checkpointing=True, **options)


def all_masked(optimizer: st.SparseOptimizer) -> bool:
    """Whether inactive weights are exact zeros."""
    return all((t.param.detach()[~t.mask] == 0).all() for t in optimizer.targets.values())


def by_hand(
    policy: str,
    *,
    net: SmallNet | None = None,
    accumulate: int = 1,
    clip: float | None = None,
    **options: Any,
) -> tuple[SmallNet, st.SparseOptimizer]:
    """The same training in a loop of one's own."""
    net = SmallNet() if net is None else net
    optimizer = sparse(net, policy, **options)
    for number in [*range(BATCHES)] * EPOCHS:
        torch.manual_seed(number)
        x, y = batch(number)
        if number % accumulate == 0:
            optimizer.zero_grad()
        (F.cross_entropy(net(x), y) / accumulate).backward()
        if (number + 1) % accumulate == 0 or number == BATCHES - 1:
            if clip is not None:
                nn.utils.clip_grad_norm_(held(optimizer), clip)
            optimizer.step()
    return net, optimizer


def held(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What an optimizer trains, in its order; gates come last."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def agree(
    net: nn.Module, optimizer: st.SparseOptimizer, other: nn.Module, twin: st.SparseOptimizer
) -> bool:
    """Whether two runs ended with the same weights, masks and state, bit for bit."""
    return (
        optimizer.step_count == twin.step_count
        and same(weights(net), weights(other))
        and same(optimizer.masks(), twin.masks())
        and same(_moments(optimizer), _moments(twin))
    )


def _moments(optimizer: st.SparseOptimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{i} {k}": v for i, entry in state.items() for k, v in entry.items() if v is not None}
