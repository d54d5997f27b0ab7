"""A training loop under a clock: dense with the bare optimizer, and sparse."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

import sparsetrain as st
from reference_runs import _common as common
from reference_runs.gpu.models import Workload
from sparsetrain.timing import clock_of, mean_seconds

SPARSITY = 0.9
#: Updates never come due while ordinary steps are timed.
NEVER = 10**9
PRECISIONS = ("bfloat16", "float32")
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-5, fused=True),
}


@dataclass
class Loop:
    """A model in training on one batch, `backward` and `step` apart.

    Attributes:
        optimizer: a SparseOptimizer, or the bare one.
    """

    backward: Callable[[], None]
    optimizer: Any

    def train_step(self) -> None:
        """Forward, backward and the optimizer's step."""
        self.backward()
        self.optimizer.step()


def begin(
    workload: Workload,
    optimizer: str,
    precision: str,
    device: torch.device,
    policy: dict[str, Any] | None = None,
) -> Loop:
    """A loop before its first step.

    Args:
        optimizer: key of OPTIMIZERS.
        precision: "bfloat16" for autocast to it, or "float32".
        policy: None for dense training with the bare optimizer.
    """
    model = workload.model().to(device)
    base = OPTIMIZERS[optimizer](model.parameters())
    held = base if policy is None else st.SparseOptimizer(base, model, workload.recipe(policy))
    x, y = workload.batch(device)
    mixed = precision == "bfloat16"

    def backward() -> None:
        held.zero_grad()
        with torch.autocast(device.type, torch.bfloat16) if mixed else nullcontext():
            logits = model(x)
            loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), y)
        loss.backward()

    return Loop(backward, held)


def interleaved(
    jobs: dict[str, Callable[[], None]],
    device: torch.device,
    *,
    rounds: int,
    calls: int,
    warm_up: int,
) -> dict[str, list[float]]:
    """Seconds a call of each job, one number a round.

    Every round runs all jobs in turn, beginning with another one each time, `calls` times each.
    """
    clock, names = clock_of(device), list(jobs)
    for job in jobs.values():
        for _ in range(warm_up):
            job()
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(mean_seconds(jobs[name], calls, clock))
    return times


# Numbers with their spread.


def in_ms(seconds: Sequence[float]) -> common.Record:
    """Median with quartiles, in milliseconds."""
    return _spread([1e3 * value for value in seconds])


def ratio(times: Sequence[float], reference: Sequence[float]) -> common.Record:
    """Median of the round-by-round ratios with quartiles, and a 95 % interval of the median."""
    ratios = [a / b for a, b in zip(times, reference, strict=True)]
    low, high = interval_of_median(ratios)
    return {**_spread(ratios), "interval_95": [round(low, 4), round(high, 4)]}


def _spread(values: Sequence[float]) -> common.Record:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": round(middle, 4), "quartiles": [round(low, 4), round(high, 4)]}


def interval_of_median(values: Sequence[float]) -> tuple[float, float]:
    """Where the median of the distribution lies with 95 % confidence, whatever its shape.

    Between the r-th smallest and the r-th largest value, r as large as the binomial distribution
    lets it be; of fewer than six values, all of them.
    """
    ordered, n = sorted(values), len(values)
    below, rank = 0.0, 0
    while (below := below + math.comb(n, rank) / 2**n) <= 0.025:
        rank += 1
    rank = max(rank, 1)
    return ordered[rank - 1], ordered[n - rank]
