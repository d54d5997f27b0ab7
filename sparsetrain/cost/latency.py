"""How long networks take, measured on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from sparsetrain.batches import called
from sparsetrain.curvature.evaluating import evaluation_mode


def latency(
    models: Sequence[nn.Module], example_inputs: Any, *, rounds: int = 7, seconds: float = 0.005
) -> tuple[float, ...]:
    """Seconds of a forward pass of each model, measured in turn, so that a busy machine hits all.

    Evaluation mode without gradients, on as many threads as torch has.

    Args:
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments.
        rounds: of which the median is taken.
        seconds: that a round of a model takes at least; fast models run several times.
    """
    jobs = [_job(model, example_inputs) for model in models]
    for job in jobs:  # the first call allocates
        job()
    calls = [max(1, round(seconds / max(job(), 1e-7))) for job in jobs]
    times = [[_mean(job, n) for job, n in zip(jobs, calls, strict=True)] for _ in range(rounds)]
    return tuple(statistics.median(column) for column in zip(*times, strict=True))


def _mean(job: Callable[[], float], calls: int) -> float:
    return statistics.fmean(job() for _ in range(calls))


def _job(model: nn.Module, example_inputs: Any) -> Callable[[], float]:
    def run() -> float:
        with evaluation_mode(model), torch.no_grad():
            _synchronise(model)
            started = time.perf_counter()
            called(model, example_inputs)
            _synchronise(model)
            return time.perf_counter() - started

    return run


def _synchronise(model: nn.Module) -> None:
    if any(parameter.is_cuda for parameter in model.parameters()):
        torch.cuda.synchronize()
