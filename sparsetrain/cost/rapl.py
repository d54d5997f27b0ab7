"""Energy of a forward pass as the processor counts it (Intel's and AMD's RAPL, through Linux)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsetrain.batches import called
from sparsetrain.evaluating import evaluation_mode

POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class MeasuredEnergy:
    """Energy of forward passes on the example inputs, the whole batch of them.

    Attributes:
        rounds: joules a pass, one number a round; what the machine takes when idle is subtracted
            where that was asked for.
        idle_watts: power of the machine when idle, median of the rounds; None where not measured.
        passes: forward passes in all rounds.
        domains: names of the counters that were added, such as package-0 and dram.
    """

    rounds: tuple[float, ...]
    idle_watts: float | None
    passes: int
    domains: tuple[str, ...]

    @property
    def joules(self) -> float:
        """Of a pass, the median of the rounds."""
        return statistics.median(self.rounds)


def measured_energy(
    model: nn.Module,
    example_inputs: Any,
    *,
    seconds: float = 1.0,
    rounds: int = 5,
    subtract_idle: bool = True,
    folder: str | Path = POWERCAP,
) -> MeasuredEnergy:
    """Measure the energy of a forward pass with the counters of the processor.

    Packages and memory are added. The counters know no processes: whatever else runs is counted,
    too. Each round is a pause and then passes, so that the idle power is that of the same minute.

    Args:
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments.
        seconds: that passes run in all rounds together; the pauses take as long again. Counters
            move about once a millisecond, so a round needs 0.05 seconds or more.
        rounds: of which the median is taken.
        subtract_idle: take off what the machine uses while it waits.
        folder: where Linux shows the counters.

    Raises:
        FileNotFoundError: the machine offers no counters.
        PermissionError: only root may read them.
        ValueError: the model is on a GPU, which they do not count, or seconds or rounds is not
            positive.
    """
    if seconds <= 0 or rounds < 1:
        raise ValueError(f"seconds and rounds must be positive, not {seconds} and {rounds}")
    if any(parameter.is_cuda for parameter in model.parameters()):
        raise ValueError("RAPL does not count what a GPU uses: move the model to the CPU")
    counters = find_counters(folder)
    with evaluation_mode(model), torch.no_grad():
        called(model, example_inputs)  # the first pass may compile or allocate
        return _measure(
            lambda: called(model, example_inputs), counters, seconds / rounds, rounds, subtract_idle
        )


def _measure(
    job: Callable[[], Any],
    counters: Sequence[Counter],
    seconds: float,
    rounds: int,
    subtract_idle: bool,
) -> MeasuredEnergy:
    idle_watts, energies, total = [], [], 0
    for _ in range(rounds):
        watts = 0.0
        if subtract_idle:
            joules, elapsed, _ = _counted(lambda: time.sleep(seconds), counters, 0)
            watts = joules / elapsed
            idle_watts.append(watts)
        joules, elapsed, passes = _counted(job, counters, seconds)
        energies.append((joules - watts * elapsed) / passes)
        total += passes
    idle = statistics.median(idle_watts) if idle_watts else None
    return MeasuredEnergy(tuple(energies), idle, total, tuple(counter.name for counter in counters))


def _counted(
    job: Callable[[], Any], counters: Sequence[Counter], seconds: float
) -> tuple[float, float, int]:
    """Joules, seconds and number of calls of a job that runs for `seconds`, at least once."""
    before, started, calls = [counter.read() for counter in counters], time.perf_counter(), 0
    elapsed = 0.0
    while not calls or elapsed < seconds:
        job()
        calls += 1
        elapsed = time.perf_counter() - started
    used = (counter.since(start) for counter, start in zip(counters, before, strict=True))
    return 1e-6 * sum(used), elapsed, calls


@dataclass(frozen=True)
class Counter:
    """One of the processor's counters, in microjoules."""

    name: str
    folder: Path
    maximum: int

    def read(self) -> int:
        """Its value now.

        Raises:
            PermissionError: only root may read it.
        """
        return _number(self.folder / "energy_uj")

    def since(self, before: int) -> int:
        """Microjoules since it showed `before`; it starts again from 0 after its maximum."""
        now = self.read()
        return now - before if now >= before else now - before + self.maximum


def find_counters(folder: str | Path = POWERCAP) -> list[Counter]:
    """Every package and every memory that counts its energy.

    Raises:
        FileNotFoundError: there is none.
        PermissionError: only root may read them.
    """
    found = []
    for zone in sorted(Path(folder).glob("intel-rapl:*")):
        with suppress(FileNotFoundError):  # containers hide what the links lead to
            name = (zone / "name").read_text(encoding="utf-8").strip()
            # Cores and graphics are parts of the package; psys is more than that, where it exists.
            if name.startswith("package") or name == "dram":
                counter = Counter(name, zone, _number(zone / "max_energy_range_uj"))
                counter.read()
                found.append(counter)
    if not found:
        raise FileNotFoundError(
            f"this machine offers no RAPL counters at {folder}: it is virtual, a container, or has "
            "no processor that counts its energy. st.cost.energy estimates instead"
        )
    return found


def _number(path: Path) -> int:
    try:
        return int(path.read_text(encoding="utf-8"))
    except PermissionError as error:
        raise PermissionError(
            f"the RAPL counter {path} is not readable: Linux shows it to root alone. Run as root, "
            f"or have root allow it with chmod a+r {path}. st.cost.energy estimates instead"
        ) from error
