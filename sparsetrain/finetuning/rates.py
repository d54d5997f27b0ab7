"""What learning rates a scheduler gives, read from a run on a stand-in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

#: Makes the scheduler of the original training on the optimizer that it is given.
Original = Callable[[Optimizer], LRScheduler]


def first_rates(optimizer: Optimizer) -> list[float]:
    """The rates that training began with, one a parameter group."""
    return [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]


def rates_of(optimizer: Optimizer, total: int, original: Original | None) -> list[list[float]]:
    """The rate of each of `total` steps and each parameter group; the optimizer stays as it is.

    Raises:
        ValueError: `original` uses another optimizer than it is given, or needs metrics.
    """
    if original is None:
        return [first_rates(optimizer)] * total
    stand_in = _StandIn(optimizer)
    scheduler: Any = original(stand_in)
    if getattr(scheduler, "optimizer", None) is not stand_in:
        raise ValueError(
            "original must make its scheduler on the optimizer that it is given, such as "
            "lambda optimizer: CosineAnnealingLR(optimizer, 1000)"
        )
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError(
            "the rates of ReduceLROnPlateau depend on metrics, so that they are not known before "
            "training: use rule='scaled'"
        )
    rates = []
    for _ in range(total):
        rates.append([float(group["lr"]) for group in stand_in.param_groups])
        stand_in.step()
        scheduler.step()
    return rates


class _StandIn(Optimizer):
    """The same groups with one number for a parameter each; its steps change nothing."""

    def __init__(self, optimizer: Optimizer) -> None:
        groups = []
        for group, rate in zip(optimizer.param_groups, first_rates(optimizer), strict=True):
            options = {name: value for name, value in group.items() if name != "params"}
            groups.append({**options, "lr": rate, "params": [Parameter(torch.zeros(()))]})
        super().__init__(groups, dict(optimizer.defaults))

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing."""
