"""A fast training loop for data that fits in memory, stoppable and resumable at any step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from sparsetrain.keeping import whole_file
from sparsetrain.workbench.data import Dataset

LossFunction = Callable[[Tensor, Tensor], Tensor]


class Scheduler(Protocol):
    """What the loop asks of a learning-rate scheduler; those of `torch.optim` have it."""

    def step(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class EpochRecord:
    """What was measured at the end of an epoch.

    `loss` is the mean over the epoch's batches, `test_accuracy` a fraction, `sparsity` the share
    of zero weights among the sparse ones (None under a plain optimizer), `seconds` the time spent
    on the epoch's training steps.
    """

    epoch: int
    step: int
    loss: float
    test_accuracy: float
    sparsity: float | None
    seconds: float


@dataclass
class History:
    """The records of a training run, one an epoch, oldest first."""

    records: list[EpochRecord] = field(default_factory=list)

    @property
    def last(self) -> EpochRecord:
        """The newest record; ValueError when no epoch has ended yet."""
        if not self.records:
            raise ValueError("no epoch has ended yet: train for at least one")
        return self.records[-1]

    @property
    def accuracies(self) -> list[float]:
        """Test accuracy after each epoch, as fractions."""
        return [record.test_accuracy for record in self.records]

    def to_list(self) -> list[dict[str, Any]]:
        """The records as plain dicts, for JSON."""
        return [asdict(record) for record in self.records]


class Trainer:
    """Trains `model` on `dataset` and can be stopped and resumed at any step, bit for bit.

    The order of samples in an epoch depends on `seed` and the epoch's number alone. Every sample
    is seen once an epoch, so the last batch may be smaller. `scheduler.step()` is called once a
    batch: its periods count steps, like everything else in this library. `on_step` is told the
    number of steps done, after each of them.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        dataset: Dataset,
        *,
        batch_size: int,
        seed: int = 0,
        scheduler: Scheduler | None = None,
        loss_fn: LossFunction = F.cross_entropy,
        on_step: Callable[[int], None] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: give at least 1")
        self.model, self.optimizer, self.dataset = model, optimizer, dataset
        self.batch_size, self.seed = batch_size, seed
        self.scheduler, self.loss_fn, self.on_step = scheduler, loss_fn, on_step
        self.step = 0
        self.history = History()
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=dataset.train_x.device)

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch."""
        return math.ceil(len(self.dataset.train_x) / self.batch_size)

    def run(self, until_step: int) -> Iterator[EpochRecord]:
        """Train up to `until_step` (counted from the start), yielding a record after each epoch.

        When `until_step` falls inside an epoch, training stops there without a record. Raises
        ValueError when the loss is no longer finite.
        """
        while self.step < until_step:
            epoch, done = divmod(self.step, self.steps_per_epoch)
            batches = self._batches(epoch)[done : done + until_step - self.step]
            started = time.perf_counter()
            self._train(batches)
            seconds = time.perf_counter() - started
            if self.step % self.steps_per_epoch == 0:
                yield self._record(epoch + 1, seconds)

    def _batches(self, epoch: int) -> tuple[Tensor, ...]:
        # Seeded afresh each epoch: a resumed run needs no generator state, only the step.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.dataset.train_x), generator=generator)
        return torch.split(order.to(self.dataset.train_x.device), self.batch_size)

    def _train(self, batches: tuple[Tensor, ...]) -> None:
        model, optimizer = self.model, self.optimizer
        inputs, labels = self.dataset.train_x, self.dataset.train_y
        model.train()
        for index in batches:
            loss = self.loss_fn(model(inputs.index_select(0, index)), labels.index_select(0, index))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step()
            self._loss_sum += loss.detach()
            self.step += 1
            if self.on_step is not None:
                self.on_step(self.step)

    def _record(self, epoch: int, seconds: float) -> EpochRecord:
        loss = self._loss_sum.item() / self.steps_per_epoch
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is {loss} in epoch {epoch}: training diverged, try a lower learning rate"
            )
        self._loss_sum.zero_()
        sparsity = getattr(self.optimizer, "sparsity", None)
        record = EpochRecord(
            epoch=epoch,
            step=self.step,
            loss=loss,
            test_accuracy=evaluate(self.model, self.dataset.test_x, self.dataset.test_y),
            sparsity=float(sparsity()) if callable(sparsity) else None,
            seconds=seconds,
        )
        self.history.records.append(record)
        return record

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs; loads with `torch.load(weights_only=True)`."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "random_state": torch.get_rng_state(),
            "step": self.step,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "loss_sum": self._loss_sum.item(),
            "history": self.history.to_list(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of an interrupted run.

        Raises ValueError when that run had another seed, batch size or use of a scheduler.
        """
        for name in ("seed", "batch_size"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"the checkpoint was written with {name}={state[name]} but this run has "
                    f"{name}={getattr(self, name)}: resume with the same value"
                )
        if (state["scheduler"] is None) != (self.scheduler is None):
            raise ValueError("the checkpoint and this run differ in having a scheduler")
        # The optimizer first: it makes the layers hold their weights as they did then.
        self.optimizer.load_state_dict(state["optimizer"])
        self.model.load_state_dict(state["model"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["random_state"])
        self.step = state["step"]
        self._loss_sum.fill_(state["loss_sum"])
        self.history = History([EpochRecord(**record) for record in state["history"]])

    def save(self, path: Path | str) -> None:
        """Write the state to a file, whole or not at all."""
        with whole_file(Path(path)) as partial:
            torch.save(self.state_dict(), partial)

    def load(self, path: Path | str) -> None:
        """Read what `save` wrote."""
        self.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))


def fit(
    model: nn.Module,
    optimizer: Optimizer,
    dataset: Dataset,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int,
    seed: int = 0,
    scheduler: Scheduler | None = None,
    loss_fn: LossFunction = F.cross_entropy,
    on_epoch: Callable[[EpochRecord], None] | None = None,
    progress: bool = True,
) -> History:
    """Train for a number of epochs, or of steps, and return what was measured after each epoch.

    Give exactly one of `epochs` and `steps`, otherwise ValueError. With `steps` a last, unfinished
    epoch leaves no record. `scheduler.step()` is called once a batch. `seed` orders the samples;
    `on_epoch` sees each record as it is made; `progress` shows a bar.
    """
    if (epochs is None) == (steps is None):
        raise ValueError("give exactly one of epochs and steps")
    trainer = Trainer(
        model,
        optimizer,
        dataset,
        batch_size=batch_size,
        seed=seed,
        scheduler=scheduler,
        loss_fn=loss_fn,
    )
    until = steps if steps is not None else (epochs or 0) * trainer.steps_per_epoch
    with _bar(trainer, until) if progress else nullcontext():
        for record in trainer.run(until):
            if on_epoch is not None:
                on_epoch(record)
    return trainer.history


@contextmanager
def _bar(trainer: Trainer, steps: int) -> Iterator[None]:
    from rich.progress import MofNCompleteColumn, Progress

    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), transient=True) as bar:
        task = bar.add_task(f"training on {trainer.dataset.name}", total=steps)
        trainer.on_step = lambda step: bar.update(task, completed=step)
        yield


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor, *, batch_size: int = 2048) -> float:
    """Share of samples whose largest logit is at their label, with the model in eval mode.

    `x` is [samples, ...], `y` int64 [samples]. The model's mode is restored afterwards.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=y.device)
    for inputs, labels in zip(torch.split(x, batch_size), torch.split(y, batch_size), strict=True):
        correct += (model(inputs).argmax(dim=1) == labels).sum()
    for module, mode in modes.items():
        module.training = mode
    return correct.item() / len(y)
