"""Joining a recipe's assignments with the optimizer that holds (some of) their tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sparsetrain.policies.group import TargetGroup
from sparsetrain.recipe import Assignment

_STORAGES = ("masked",)


def check_arguments(optimizer: Any, model: Any, storage: str) -> None:
    """Refuse arguments of the wrong kind, and an optimizer that is wrapped already."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, not {_type(optimizer)}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {_type(model)}")
    if hasattr(optimizer, "base") and hasattr(optimizer, "masks"):
        raise ValueError("optimizer is wrapped already: give one recipe with rules instead")
    for hook in optimizer._optimizer_step_pre_hooks.values():
        if hasattr(getattr(hook, "__self__", None), "masks"):
            raise ValueError("optimizer is wrapped already: finalize() the first wrapper")
    if storage not in _STORAGES:
        raise ValueError(f"storage {storage!r} is not one of {', '.join(_STORAGES)}")


def held_by(
    optimizer: Optimizer, assignments: list[Assignment]
) -> tuple[list[Assignment], list[Assignment]]:
    """Split assignments into the tensors that the optimizer holds and those it does not (yet)."""
    here = {id(param) for group in optimizer.param_groups for param in group["params"]}
    held, waiting = [], []
    for assignment in assignments:
        inside = [c for c in assignment.candidates if id(c.param) in here]
        outside = [c for c in assignment.candidates if id(c.param) not in here]
        if inside:
            held.append(Assignment(assignment.policy, inside))
        if outside:
            waiting.append(Assignment(assignment.policy, outside))
    return held, waiting


def copy_to_device_of(value: Any, group: TargetGroup) -> Any:
    """A copy of a saved memory entry, tensors on the device of the group's weights."""
    if isinstance(value, torch.Tensor):
        return value.to(group.targets[0].param.device, copy=True)
    return value


def _type(value: Any) -> str:
    return type(value).__name__
