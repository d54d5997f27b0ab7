"""How long things take, so that a busy machine slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch

Job = Callable[[], Any]


class Clock(Protocol):
    """Marks moments, and says afterwards how long the spans between them were."""

    def mark(self) -> Any:
        """Now."""

    def spans(self, marks: Sequence[Any]) -> list[float]:
        """Seconds between each mark and the next."""


class CpuClock:
    """Reads the time at once: work on the CPU is over when a call returns."""

    def mark(self) -> float:
        """Seconds since some moment."""
        return time.perf_counter()

    def spans(self, marks: Sequence[float]) -> list[float]:
        """Seconds between each mark and the next."""
        return [after - before for before, after in pairwise(marks)]


class CudaClock:
    """Puts events between the kernels of the current stream, which the GPU stamps as it passes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> torch.cuda.Event:
        """An event after all work that was asked for so far."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def spans(self, marks: Sequence[torch.cuda.Event]) -> list[float]:
        """Seconds between each mark and the next."""
        marks[-1].synchronize()
        return [1e-3 * before.elapsed_time(after) for before, after in pairwise(marks)]


def clock_of(device: torch.device) -> Clock:
    """The clock for work on a device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def median_seconds(
    jobs: Sequence[Job], clock: Clock | None = None, *, rounds: int = 7, seconds: float = 0.003
) -> list[float]:
    """Seconds of each job, measured in turn.

    Args:
        clock: that of the CPU when None.
        rounds: of which the median is taken.
        seconds: that a round of a job takes at least; fast jobs run several times.
    """
    clock = clock or CpuClock()
    for job in jobs:  # the first call may compile or allocate
        job()
    calls = [max(1, round(seconds / max(mean_seconds(job, 1, clock), 1e-6))) for job in jobs]
    pairs = list(zip(jobs, calls, strict=True))
    times = [[mean_seconds(job, count, clock) for job, count in pairs] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def mean_seconds(job: Job, calls: int, clock: Clock) -> float:
    """Seconds of a call, the mean over some."""
    began = clock.mark()
    for _ in range(calls):
        job()
    return clock.spans([began, clock.mark()])[0] / calls
