"""Mask updates to a logger, with one line."""

from __future__ import annotations

import inspect
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import distributed, nn
from torch.utils.hooks import RemovableHandle

from sparsetrain.keeping import whole_file
from sparsetrain.report.events import UpdateEvent

if TYPE_CHECKING:
    from sparsetrain.optimizer import SparseOptimizer

_Write = Callable[[UpdateEvent], None]
_WriteScalars = Callable[[dict[str, float], int], Any]

_UNDERSTOOD = (
    "a TensorBoard SummaryWriter (add_scalar), an object with log_metrics(dict, step=...) or "
    "log(dict, step=...) as Lightning's loggers, MLflow and W&B (after wandb.init) have, a "
    "logging.Logger, a function of (dict, step), or the path of a .jsonl file"
)


def log_updates(
    optimizer: SparseOptimizer,
    logger: Any,
    *,
    prefix: str = "sparsity/",
    layers: bool = True,
    all_ranks: bool = False,
) -> RemovableHandle:
    """Write every mask update to a logger, at the step of the optimizer's clock.

    The clock is in the checkpoint, so a resumed run goes on counting. Where torch.distributed is
    initialised, rank 0 alone writes; the others may give None. An error of the logger comes out of
    `optimizer.step()`, after the masks have changed.

    Args:
        logger: a TensorBoard `SummaryWriter`; anything with `log_metrics(dict, step=...)` (loggers
            of Lightning, the module mlflow) or `log(dict, step=...)` (trackers of accelerate); a
            W&B run or the module wandb, which gets the clock as `<prefix>step`, the axis of these
            curves; a `logging.Logger`, for a line of text at level INFO; a function of
            (dict, step); or the path of a .jsonl file, for the whole event as a line.
        prefix: before the name of each number.
        layers: whether each layer's sparsity is among the numbers. Files always have the layers.
        all_ranks: whether every rank writes, each to the logger that it gives.

    Returns:
        Its `remove()` ends the logging. It does not close the logger.

    Raises:
        TypeError: there is no such way to log; the message lists those that there are.
        ValueError: the file is not a .jsonl file of mask updates.
    """
    if not hasattr(optimizer, "register_update_hook"):
        raise TypeError(f"mask updates come from a SparseOptimizer, not from {_called(optimizer)}")
    if not all_ranks and _rank() != 0:
        # Followed all the same: what events are made of is then counted alike on all ranks.
        return optimizer.register_update_hook(lambda event: None)
    return optimizer.register_update_hook(_writer(logger, prefix, layers))


def _writer(logger: Any, prefix: str, layers: bool) -> _Write:
    if isinstance(logger, str | os.PathLike):
        return _LineFile(Path(logger))
    if isinstance(logger, logging.Logger | logging.LoggerAdapter):
        return lambda event: logger.info("%s", _in_words(event))
    write = _scalar_writer(logger, prefix)
    return lambda event: write(_numbers(event, prefix, layers), event.step)


def _scalar_writer(logger: Any, prefix: str) -> _WriteScalars:
    """How this logger takes named numbers and a step."""
    if _takes(getattr(logger, "add_scalar", None), "tag", 0.0, global_step=0):
        return lambda numbers, step: _add_scalars(logger, numbers, step)
    if _takes(getattr(logger, "log_metrics", None), {}, step=0):
        return lambda numbers, step: logger.log_metrics(numbers, step=step)
    if _takes(getattr(logger, "define_metric", None), "name", step_metric="clock"):
        return _wandb_writer(logger, prefix)
    if hasattr(logger, "log"):  # with other arguments it is something else, as a LightningModule's
        if _takes(logger.log, {}, step=0):
            return lambda numbers, step: logger.log(numbers, step=step)
    elif not isinstance(logger, type | nn.Module) and _takes(logger, {}, 0):
        return lambda numbers, step: logger(numbers, step)
    raise TypeError(f"cannot log mask updates to {_called(logger)}: give {_UNDERSTOOD}")


def _add_scalars(writer: Any, numbers: Mapping[str, float], step: int) -> None:
    for name, number in numbers.items():
        writer.add_scalar(name, number, global_step=step)


def _wandb_writer(run: Any, prefix: str) -> _WriteScalars:
    """W&B drops rows whose step is not above its own count of rows, which is not our clock. So the
    clock is a number in the row, and the axis of the others."""
    clock = f"{prefix}step"
    if prefix:  # without one the glob would be every metric of the run
        run.define_metric(f"{prefix}*", step_metric=clock)
    return lambda numbers, step: run.log({**numbers, clock: step})


class _LineFile:
    """A file with an event a line, in the order of steps, also after training was resumed."""

    def __init__(self, path: Path) -> None:
        if path.suffix != ".jsonl":
            raise ValueError(
                f"{path} does not end in .jsonl, the files that mask updates are written to; for a "
                "TensorBoard folder give a SummaryWriter"
            )
        self._path = path
        records = _read(path)
        self._last: int | None = records[-1]["step"] if records else None
        self._has_written = False

    def __call__(self, event: UpdateEvent) -> None:
        if not self._has_written:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._keep_before(event.step)
        elif self._last is not None and event.step < self._last:
            self._keep_before(event.step)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event.to_dict()) + "\n")
        self._last, self._has_written = event.step, True

    def _keep_before(self, step: int) -> None:
        """Forget what was written after the checkpoint that training went on from; and a line that
        was cut short. A run that starts over puts the file aside."""
        records = _read(self._path)
        kept = [record for record in records if record["step"] < step]
        if records and not kept:
            self._path.rename(_free_name(self._path))
        elif self._path.exists():
            with whole_file(self._path) as partial:
                lines = "".join(json.dumps(record) + "\n" for record in kept)
                partial.write_text(lines, encoding="utf-8")


def _read(path: Path) -> list[dict[str, Any]]:
    """The updates in a file; the last line may have been cut short."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines) and line.startswith("{"):
                break
            record = None
        if not (isinstance(record, dict) and isinstance(record.get("step"), int)):
            raise ValueError(f"line {number} of {path} is not a mask update: give another path")
        records.append(record)
    return records


def _free_name(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return aside


def _numbers(event: UpdateEvent, prefix: str, layers: bool) -> dict[str, float]:
    numbers = event.scalars(prefix)
    left_out = () if layers else {f"{prefix}{layer.name}" for layer in event.layers}
    return {name: number for name, number in numbers.items() if name not in left_out}


def _in_words(event: UpdateEvent) -> str:
    dropped = sum(layer.dropped for layer in event.layers)
    grown = sum(layer.grown for layer in event.layers)
    return (
        f"step {event.step}: {event.sparsity:.2%} sparse, {dropped:,} dropped, {grown:,} grown, "
        f"{event.exploration_rate:.2%} explored"
    )


def _takes(method: Any, *args: Any, **kwargs: Any) -> bool:
    """Whether it can be called so."""
    try:
        inspect.signature(method).bind(*args, **kwargs)
    except TypeError:
        return False
    except ValueError:  # what is built in need not say what it takes
        return True
    return True


def _rank() -> int:
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank()
    return 0


def _called(thing: Any) -> str:
    if isinstance(thing, type):
        return f"the class {thing.__name__} itself"
    if isinstance(thing, ModuleType):
        return f"the module {thing.__name__}"
    return f"a {type(thing).__name__}"
