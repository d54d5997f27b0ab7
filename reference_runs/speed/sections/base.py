"""What the sections of the benchmark share: cases, effort, ratios, and a row's numbers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from reference_runs import _common as common
from reference_runs.speed.run import interleaved, ratio

Record = common.Record
Jobs = dict[str, Callable[[], object]]
THREADS = 2


@dataclass(frozen=True)
class Effort:
    """How long everything is measured; `quick` only shows that it runs."""

    rounds: int
    seconds: float
    quick: bool = False

    def scaled(self, share: float) -> Effort:
        """The same with shorter rounds."""
        return Effort(self.rounds, self.seconds * share, self.quick)


@dataclass(frozen=True)
class Section:
    """A part of the benchmark: its cases, how one is measured, and how the rows are shown.

    A row is the case and what was measured, so that an interrupted run knows which cases it has.

    Attributes:
        cases: quick or not -> the cases, plain data.
        measure: (case, effort) -> what is added to the case.
        table: rows -> Markdown.
    """

    cases: Callable[[bool], list[Record]]
    measure: Callable[[Record, Effort], Record]
    table: Callable[[list[Record]], str]


def compare(jobs: Jobs, reference: str, effort: Effort, *, warm_up: int = 3) -> Record:
    """Milliseconds of each job, and how many times faster than `reference` the others are."""
    times = interleaved(jobs, rounds=effort.rounds, seconds=effort.seconds, warm_up=warm_up)
    return {
        "ms": medians(times),
        "speedup": {
            name: ratio(times[reference], taken)
            for name, taken in times.items()
            if name != reference
        },
    }


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    """Median milliseconds of each job."""
    return {name: milliseconds(taken) for name, taken in times.items()}


def milliseconds(seconds: Sequence[float]) -> float:
    """The median, in milliseconds, with four digits or so."""
    return round(1e3 * statistics.median(seconds), 4)


def with_quartiles(measured: Record, digits: int = 2) -> str:
    """A ratio as `compare` gives it, for a table."""
    low, high = measured["quartiles"]
    middle = measured["ratio"]
    return f"**{middle:.{digits}f}** ({low:.{digits}f} to {high:.{digits}f})"


def per_cent(share: float) -> str:
    """0.98 -> 98 %."""
    return f"{100 * share:g} %"


def distinct(rows: Iterable[Record], *names: str) -> list[tuple[object, ...]]:
    """The different values of some columns together, in the order they come."""
    return list(dict.fromkeys(tuple(row[name] for name in names) for row in rows))
