"""How long things take, so that a busy machine slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any


def median_seconds(
    jobs: Sequence[Callable[[], Any]], *, rounds: int = 7, seconds: float = 0.003
) -> list[float]:
    """Seconds of each job, measured in turn.

    Args:
        rounds: of which the median is taken.
        seconds: that a round of a job takes at least; fast jobs run several times.
    """
    for job in jobs:  # the first call may compile or allocate
        job()
    calls = [max(1, round(seconds / max(_mean(job, 1), 1e-6))) for job in jobs]
    times = [[_mean(job, n) for job, n in zip(jobs, calls, strict=True)] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def _mean(job: Callable[[], Any], calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        job()
    return (time.perf_counter() - started) / calls
