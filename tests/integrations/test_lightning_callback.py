"""What `SparsityCallback` logs and refuses, and Lightning's other ways to run."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.tuner import Tuner
from lightning_runs import (
    ALL,
    EPOCHS,
    Early,
    Net,
    agree,
    by_hand,
    data,
    sparse,
    sparse_of,
    trainer_of,
)
from runs import POLICIES, SmallNet
from torch import nn
from torch.nn import functional as F

import sparsetrain as st
from sparsetrain import integrations
from sparsetrain.integrations.lightning import SparsityCallback

# Lightning 2.6 by itself: under torch 2.13, and of what would be faster.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


# The log.


class Events(pl.Callback):
    def __init__(self) -> None:
        self.events: list[st.UpdateEvent] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        sparse_of(trainer).register_update_hook(self.events.append)


@pytest.mark.parametrize("layers", [False, True], ids=["totals", "layers"])
def test_every_update_is_logged(layers: bool, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = Events()
    loggers = [CSVLogger(tmp_path), TensorBoardLogger(tmp_path)]
    callbacks = events, SparsityCallback(layers=layers)
    trainer_of(tmp_path, *callbacks, logger=loggers, log_every_n_steps=5).fit(Net("rigl"), data())
    steps = [event.step for event in events.events]
    assert steps == [0, 3, 6, 9]
    with (Path(loggers[0].log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["sparsity/total"]]
    assert [int(row["step"]) for row in rows] == steps
    for row, event in zip(rows, events.events, strict=True):
        for name, value in event.scalars().items():
            if layers or name.split("/")[1] in ("total", "exploration_rate", "dropped", "grown"):
                assert float(row[name]) == pytest.approx(value)
            else:
                assert name not in row
    board = EventAccumulator(loggers[1].log_dir)
    board.Reload()
    written = {entry.step: entry.value for entry in board.Scalars("sparsity/grown")}
    assert written == {event.step: event.scalars()["sparsity/grown"] for event in events.events}


def test_two_sparse_optimizers_are_logged_apart(tmp_path: Path) -> None:
    class Two(Net):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(self.loss(batch))
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self) -> Any:
            policy = POLICIES["set"]
            parts = self.net.conv, nn.ModuleList([self.net.hidden, self.net.head])
            bases = [torch.optim.SGD(part.parameters(), lr=0.1) for part in parts]
            return [st.SparseOptimizer(base, self.net, policy) for base in bases]

    logger = CSVLogger(tmp_path)
    callback = SparsityCallback(layers=True)  # which cannot know the number of steps
    trainer = trainer_of(tmp_path, callback, logger=logger, max_epochs=1)
    trainer.fit(Two("set"), data())
    assert [set(sparse_of(trainer, i).targets) for i in range(2)] == [
        {"conv.weight"},
        {"hidden.weight", "head.weight"},
    ]
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        names = csv.DictReader(file).fieldnames
    assert {"sparsity/0/total", "sparsity/0/conv.weight", "sparsity/1/head.weight"} <= {*names}
    assert "sparsity/1/conv.weight" not in names


# Refusals.


def test_a_module_without_a_sparse_optimizer_is_refused(tmp_path: Path) -> None:
    class Dense(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(ValueError, match="of Dense gave SGD, and no SparseOptimizer: return"):
        trainer_of(tmp_path, SparsityCallback()).fit(Dense("rigl"), data())


def test_a_policy_for_another_number_of_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'rigl' is for total_steps=14 and the Trainer makes 21"):
        trainer_of(tmp_path, SparsityCallback(), max_epochs=3).fit(Net("rigl"), data())
    with pytest.raises(ValueError, match=r"'movement' is for .* and the Trainer makes 5"):
        trainer_of(tmp_path, SparsityCallback(), max_steps=5).fit(Net("movement"), data())


@pytest.mark.parametrize(
    "callback, options",
    [
        (SparsityCallback(check_total_steps=False), {"max_epochs": 1}),
        (SparsityCallback(), {"fast_dev_run": 3}),
        (SparsityCallback(), {"max_epochs": -1, "max_time": {"seconds": 0.2}}),
        (GradientAccumulationScheduler({1: 2}), {"max_epochs": 3}),
    ],
    ids=["meant", "fast_dev_run", "endless", "accumulation"],
)
def test_other_numbers_of_steps_that_are_meant(
    callback: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    callbacks = (
        [callback] if isinstance(callback, SparsityCallback) else [callback, SparsityCallback()]
    )
    trainer = trainer_of(tmp_path, *callbacks, **options)
    trainer.fit(Net("rigl"), data())
    assert sparse_of(trainer).step_count == trainer.global_step > 0


def test_flattened_weights_are_refused(tmp_path: Path) -> None:
    class Flattening(pl.strategies.SingleDeviceStrategy):
        pass

    Flattening.__name__ = FSDPStrategy.__name__  # which needs a GPU
    trainer = trainer_of(tmp_path, SparsityCallback(), strategy=Flattening("cpu"))
    with pytest.raises(ValueError, match="FSDPStrategy trains flattened copies of the weights"):
        trainer.fit(Net("rigl"), data())


# Other ways of Lightning.


@pytest.mark.parametrize(
    "module, policy",
    [*((Net, policy) for policy in ("static", "rigl", "gradual")), *((Early, p) for p in ALL)],
)
def test_after_looking_for_a_learning_rate(module: Any, policy: str, tmp_path: Path) -> None:
    """Which sets the optimizer up twice."""
    runs = []
    for looks in (True, False):
        made, trainer = module(policy), trainer_of(tmp_path, SparsityCallback())
        if looks:
            Tuner(trainer).lr_find(made, data(), num_training=4, update_attr=False)
            assert not made._load_state_dict_pre_hooks
        trainer.fit(made, data())
        runs += [made.net, sparse_of(trainer)]
    assert agree(*runs)


def test_the_other_package_of_lightning(tmp_path: Path) -> None:
    import pytorch_lightning

    class Other(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = SmallNet()

        def configure_optimizers(self) -> Any:
            return sparse(self.net, "rigl")

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self.net(batch[0]), batch[1])

    module = Other()
    trainer = pytorch_lightning.Trainer(
        callbacks=[SparsityCallback()],
        accelerator="cpu",
        max_epochs=EPOCHS,
        logger=pytorch_lightning.loggers.CSVLogger(tmp_path),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data())
    assert agree(module.net, trainer.optimizers[0], *by_hand("rigl"))
    assert "sparsity/total" in (Path(trainer.logger.log_dir) / "metrics.csv").read_text()


# Importing.


def test_pytorch_lightning_alone_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    import pytorch_lightning

    monkeypatch.setattr(integrations, "lightning", integrations.lightning)
    monkeypatch.delitem(sys.modules, "sparsetrain.integrations.lightning")
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    loaded = integrations.__getattr__("lightning")
    assert issubclass(loaded.SparsityCallback, pytorch_lightning.Callback)


def test_without_lightning_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "sparsetrain.integrations.lightning")
    for package in ("lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install 'sparsetrain\[lightning\]'"):
        integrations.__getattr__("lightning")
