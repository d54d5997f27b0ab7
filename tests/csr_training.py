"""What tests of training by non-zeros share."""

from __future__ import annotations

from typing import Any

import torch
from runs import same
from sparse_twins import (
    backward,
    policies,
)
from torch import nn

DYNAMIC: dict[str, Any] = {"total_steps": 12, "update": {"every": 2}}


EVERY_POLICY = sorted(policies(1))


def step_of(model: nn.Module, optimizer: Any, step: int) -> float:
    loss = backward(model, step)
    optimizer.step()
    return float(loss)


def snapshot(model: nn.Module, base: torch.optim.Optimizer) -> Any:
    return (
        [type(m) for m in model.modules()],
        [(name, id(p)) for name, p in model.named_parameters()],
        [[id(p) for p in group["params"]] for group in base.param_groups],
        {name: value.clone() for name, value in model.state_dict().items()},
        [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()],
        (len(base._optimizer_step_pre_hooks), len(base._optimizer_step_post_hooks)),
    )


def is_as_it_was(before: Any, model: nn.Module, base: torch.optim.Optimizer) -> bool:
    after = snapshot(model, base)
    return before[:3] == after[:3] and same(before[3], after[3]) and before[4:] == after[4:]
