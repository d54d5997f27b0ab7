"""One line sends every mask update to a logger, also after training was resumed."""

from __future__ import annotations

import copy
import csv
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as some
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from runs import STEPS, train, wrap
from torch import nn

import sparsetrain as st
from sparsetrain.report.logging import log_updates

EVERY = 3  # the update schedule of the policies in runs.py
UPDATES = list(range(0, STEPS, EVERY))
TOTALS = {f"sparsity/{name}" for name in ("total", "exploration_rate", "dropped", "grown")}
LAYERS = {f"sparsity/{name}.weight" for name in ("conv", "hidden", "head")}

Logged = list[tuple[int, dict[str, float]]]


def collect(logged: Logged) -> Any:
    return lambda numbers, step: logged.append((step, numbers))


def run(logger: Any, policy: str = "set", **options: Any) -> list[st.UpdateEvent]:
    """Train to the end with a logger; returns the events."""
    model, optimizer = wrap("momentum", policy)
    events: list[st.UpdateEvent] = []
    optimizer.register_update_hook(events.append)
    handle = log_updates(optimizer, logger, **options)
    train(model, optimizer, 0, STEPS)
    handle.remove()
    return events


def curves(events: list[st.UpdateEvent]) -> dict[str, list[tuple[int, float]]]:
    """What should be seen of each number: (step, value)."""
    names = events[0].scalars()
    return {name: [(e.step, e.scalars()[name]) for e in events] for name in names}


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


# Loggers of each kind.


def test_a_function_gets_numbers_and_step() -> None:
    logged: Logged = []
    events = run(collect(logged))
    assert [step for step, _ in logged] == UPDATES
    assert [numbers for _, numbers in logged] == [event.scalars() for event in events]
    assert logged[0][1].keys() == TOTALS | LAYERS


def test_prefix_and_layers() -> None:
    logged: Logged = []
    run(collect(logged), prefix="masks.", layers=False)
    assert all(
        numbers.keys() == {name.replace("sparsity/", "masks.") for name in TOTALS}
        for _, numbers in logged
    )
    assert logged[0][1]["masks.dropped"] > 0


def test_tensorboard_reads_back_what_was_logged(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        events = run(writer)
    seen = EventAccumulator(str(tmp_path)).Reload()
    expected = curves(events)
    assert set(seen.Tags()["scalars"]) == expected.keys()
    for name, points in expected.items():
        assert [(e.step, e.value) for e in seen.Scalars(name)] == [
            (step, pytest.approx(value)) for step, value in points
        ]


def test_tensorboard_hides_what_a_resumed_run_repeats(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    model, optimizer = wrap("momentum", "set")
    train(model, optimizer, 0, 4)
    saved = copy.deepcopy(optimizer.state_dict())
    with SummaryWriter(tmp_path, filename_suffix=".1") as writer:
        log_updates(optimizer, writer)
        train(model, optimizer, 4, 11)
    model, optimizer = wrap("momentum", "set")
    optimizer.load_state_dict(saved)
    purge_step = optimizer.step_count
    with SummaryWriter(tmp_path, purge_step=purge_step, filename_suffix=".2") as writer:
        log_updates(optimizer, writer)
        train(model, optimizer, 4, STEPS)
    seen = EventAccumulator(str(tmp_path)).Reload()
    assert [point.step for point in seen.Scalars("sparsity/total")] == [6, 9, 12]


def test_a_lightning_logger(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    events = run(logger)
    logger.save()
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == UPDATES
    assert [float(row["sparsity/conv.weight"]) for row in rows] == [
        event.scalars()["sparsity/conv.weight"] for event in events
    ]


class Tracker:
    """Takes what `log` of accelerate's trackers takes."""

    def __init__(self) -> None:
        self.logged: Logged = []

    def log(self, values: dict[str, float], step: int | None = None, **settings: Any) -> None:
        assert step is not None
        self.logged.append((step, values))


def test_an_object_that_logs_a_dict_with_a_step() -> None:
    tracker = Tracker()
    events = run(tracker)
    assert tracker.logged == [(event.step, event.scalars()) for event in events]


class Run:
    """The parts of `wandb.Run` 0.31 that matter here, and its rule about steps."""

    def __init__(self) -> None:
        self.axes: dict[str, str] = {}
        self.rows: list[dict[str, Any]] = []

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        assert step_metric is not None
        self.axes[name] = step_metric

    def log(
        self, data: dict[str, Any], step: int | None = None, commit: bool | None = None
    ) -> None:
        if step is None or step >= len(self.rows):  # other rows are dropped
            self.rows.append(data)


def test_a_wandb_run_keeps_every_row_beside_those_of_the_training_loop() -> None:
    wandb_run = Run()
    model, optimizer = wrap("momentum", "set")
    log_updates(optimizer, wandb_run)
    for step in range(STEPS):
        train(model, optimizer, step, step + 1)
        wandb_run.log({"loss": 0.0})
        wandb_run.log({"accuracy": 0.0})  # so that its count of rows is ahead of the clock
    ours = [row for row in wandb_run.rows if "sparsity/total" in row]
    assert [row["sparsity/step"] for row in ours] == UPDATES
    assert wandb_run.axes == {"sparsity/*": "sparsity/step"}
    assert len(wandb_run.rows) == 2 * STEPS + len(UPDATES)


def test_without_a_prefix_the_other_metrics_of_a_wandb_run_keep_their_axis() -> None:
    wandb_run = Run()
    run(wandb_run, prefix="")
    assert wandb_run.axes == {}
    assert [row["step"] for row in wandb_run.rows] == UPDATES


@pytest.mark.parametrize("is_adapter", [False, True], ids=["logger", "adapter"])
def test_a_line_of_text(is_adapter: bool, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("sparse run")
    caplog.set_level(logging.INFO, "sparse run")
    events = run(logging.LoggerAdapter(logger, {}) if is_adapter else logger)
    assert len(caplog.records) == len(UPDATES)
    moved = sum(layer.grown for layer in events[1].layers)
    assert caplog.records[1].levelno == logging.INFO
    assert caplog.records[1].getMessage() == (
        f"step 3: {events[1].sparsity:.2%} sparse, {moved} dropped, {moved} grown, "
        f"{events[1].exploration_rate:.2%} explored"
    )


@pytest.mark.parametrize("policy", ["rigl", "snfs", "gradual", "dynamic_network_surgery"])
def test_every_policy_is_logged_at_its_steps(policy: str) -> None:
    logged: Logged = []
    events = run(collect(logged), policy)
    assert [step for step, _ in logged] == [event.step for event in events] != []


def test_a_removed_handle_ends_it() -> None:
    logged: Logged = []
    model, optimizer = wrap("momentum", "set")
    with log_updates(optimizer, collect(logged)):
        train(model, optimizer, 0, 4)
    train(model, optimizer, 4, STEPS)
    assert [step for step, _ in logged] == [0, 3]


def test_an_error_of_the_logger_is_not_hidden() -> None:
    def fail(numbers: dict[str, float], step: int) -> None:
        raise ConnectionError("no network")

    with pytest.raises(ConnectionError, match="no network"):
        run(fail)


# What cannot be logged to.


class LogsOneValue(LightningModule):
    """Its `log` takes a name and a value."""


@pytest.mark.parametrize(
    "logger, called",
    [
        (None, "a NoneType"),
        ({}, "a dict"),
        (LogsOneValue(), "a LogsOneValue"),
        (nn.Linear(2, 2), "a Linear"),  # can be called with anything
        (Tracker, "the class Tracker itself"),
        (Run, "the class Run itself"),
        (json, "the module json"),
        (lambda numbers: None, "a function"),
    ],
    ids=[
        "none",
        "dict",
        "lightning",
        "module",
        "class",
        "wandb_class",
        "python_module",
        "one_argument",
    ],
)
def test_what_it_does_not_understand_is_named(logger: Any, called: str) -> None:
    _, optimizer = wrap("momentum", "set")
    with pytest.raises(TypeError, match=f"cannot log mask updates to {called}: .*add_scalar"):
        log_updates(optimizer, logger)
    assert optimizer._keeper.listeners == {}
    assert optimizer._keeper.tracker.explored is None


def test_updates_come_from_a_sparse_optimizer() -> None:
    _, optimizer = wrap("momentum", "set")
    with pytest.raises(TypeError, match="from a SparseOptimizer, not from a SGD"):
        log_updates(optimizer.base, print)  # type: ignore[arg-type]


# Files.


def test_a_file_holds_whole_events(tmp_path: Path) -> None:
    path = tmp_path / "new" / "updates.jsonl"
    events = run(str(path), layers=False)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        json.loads(json.dumps(event.to_dict())) for event in events
    ]


def stop_and_resume(path: Path, saved_at: int, stopped_at: int) -> None:
    """A run is saved, goes on for a while, is lost, and is taken up from where it was saved."""
    model, optimizer = wrap("momentum", "set")
    log_updates(optimizer, path)
    train(model, optimizer, 0, saved_at)
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(saved, path.with_suffix(".pt"))
    train(model, optimizer, saved_at, stopped_at)

    model, optimizer = wrap("momentum", "set")
    log_updates(optimizer, path)
    saved = torch.load(path.with_suffix(".pt"), weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(model, optimizer, saved_at, STEPS)


@pytest.mark.parametrize("saved_at, stopped_at", [(4, 4), (4, 11), (6, 7), (7, 8), (1, 13)])
def test_a_resumed_run_leaves_the_file_of_one_that_was_not_stopped(
    saved_at: int, stopped_at: int, tmp_path: Path
) -> None:
    stop_and_resume(tmp_path / "stopped.jsonl", saved_at, stopped_at)
    run(tmp_path / "straight.jsonl")
    assert (tmp_path / "stopped.jsonl").read_text() == (tmp_path / "straight.jsonl").read_text()
    assert not list(tmp_path.glob("*.jsonl.*"))


def test_a_forced_update_beside_a_due_one_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "updates.jsonl"
    model, optimizer = wrap("momentum", "set")
    log_updates(optimizer, path)
    train(model, optimizer, 0, 3)
    optimizer.update_masks()
    train(model, optimizer, 3, 4)
    assert steps_in(path) == [0, 3, 3]


def test_a_run_that_goes_back_writes_its_steps_anew(tmp_path: Path) -> None:
    path = tmp_path / "updates.jsonl"
    model, optimizer = wrap("momentum", "set")
    log_updates(optimizer, path)
    train(model, optimizer, 0, 4)
    saved = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 4, STEPS)
    optimizer.load_state_dict(saved)
    train(model, optimizer, 4, 8)
    assert steps_in(path) == [0, 3, 6]


def test_a_run_that_starts_over_puts_the_file_aside(tmp_path: Path) -> None:
    path = tmp_path / "updates.jsonl"
    for _ in range(3):
        run(path)
    names = ("updates.jsonl", "updates.jsonl.1", "updates.jsonl.2")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(names)
    assert all(steps_in(tmp_path / name) == UPDATES for name in names)


def test_a_run_that_never_updates_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "updates.jsonl"
    run(path)
    before = path.read_text()
    _, optimizer = wrap("momentum", "set")
    log_updates(optimizer, path)
    assert path.read_text() == before


@settings(max_examples=30)
@given(cut=some.integers(min_value=1, max_value=400))
def test_a_line_that_was_cut_short_does_not_spoil_the_file(
    cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("cut") / "updates.jsonl"
    event = st.UpdateEvent(6, 0.5, 0.75, (st.LayerChange("conv.weight", 1, 1, 10, 20),))
    whole = json.dumps(event.to_dict())
    before = json.dumps({**event.to_dict(), "step": 0})
    path.write_text(f"{before}\n{whole[:cut]}")
    model, optimizer = wrap("momentum", st.SET(sparsity=0.5, total_steps=8, update={"start": 6}))
    log_updates(optimizer, path)
    train(model, optimizer, 0, 8)
    assert steps_in(path) == [0, 6]


@pytest.mark.parametrize(
    "content",
    ["import torch\n", '{"loss": 1.0}\n', '[1]\n{"step": 1}\n', '{"step": 1}\n{"st\n{"step": 2}\n'],
    ids=["text", "other", "list", "damaged"],
)
def test_a_file_of_something_else_is_not_touched(content: str, tmp_path: Path) -> None:
    path = tmp_path / "updates.jsonl"
    path.write_text(content)
    _, optimizer = wrap("momentum", "set")
    with pytest.raises(ValueError, match=r"line \d of .*updates\.jsonl is not a mask update"):
        log_updates(optimizer, path)
    assert path.read_text() == content


def test_a_folder_is_answered_with_what_to_do(tmp_path: Path) -> None:
    _, optimizer = wrap("momentum", "set")
    with pytest.raises(ValueError, match="give a SummaryWriter"):
        log_updates(optimizer, tmp_path)


# Resuming, and ranks.


def test_steps_go_on_after_loading_a_checkpoint() -> None:
    logged: Logged = []
    model, optimizer = wrap("momentum", "set")
    train(model, optimizer, 0, 7)
    other_model, other = wrap("momentum", "set")
    log_updates(other, collect(logged))
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    train(other_model, other, 7, STEPS)
    assert [step for step, _ in logged] == [9, 12]


@pytest.fixture
def second_of_two_ranks() -> Iterator[None]:
    if not dist.is_available():
        pytest.skip("this torch has no torch.distributed")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("second_of_two_ranks")
def test_other_ranks_are_silent_but_count_alike() -> None:
    logged: Logged = []
    model, optimizer = wrap("momentum", "set")
    log_updates(optimizer, collect(logged))
    log_updates(optimizer, None)  # what has no logger on this rank
    train(model, optimizer, 0, STEPS)
    assert logged == []
    assert optimizer._keeper.tracker.explored is not None


@pytest.mark.usefixtures("second_of_two_ranks")
def test_all_ranks_log_when_asked() -> None:
    logged: Logged = []
    run(collect(logged), all_ranks=True)
    assert [step for step, _ in logged] == UPDATES
