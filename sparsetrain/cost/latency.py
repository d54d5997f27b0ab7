"""How long networks take, measured on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from sparsetrain.batches import called
from sparsetrain.evaluating import evaluation_mode
from sparsetrain.timing import median_seconds


def latency(
    models: Sequence[nn.Module], example_inputs: Any, *, rounds: int = 7, seconds: float = 0.005
) -> tuple[float, ...]:
    """Seconds of a forward pass of each model, measured in turn.

    Evaluation mode without gradients, on as many threads as torch has.

    Args:
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments.
        rounds: of which the median is taken.
        seconds: that a round of a model takes at least; fast models run several times.
    """
    jobs = [_job(model, example_inputs) for model in models]
    with ExitStack() as modes, torch.no_grad():
        for model in models:
            modes.enter_context(evaluation_mode(model))
        return tuple(median_seconds(jobs, rounds=rounds, seconds=seconds))


def _job(model: nn.Module, example_inputs: Any) -> Callable[[], None]:
    on_gpu = any(parameter.is_cuda for parameter in model.parameters())

    def run() -> None:
        called(model, example_inputs)
        if on_gpu:
            torch.cuda.synchronize()

    return run
