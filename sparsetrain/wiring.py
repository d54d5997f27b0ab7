"""Joining a recipe's assignments with the optimizer that holds (some of) their tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sparsetrain.policies import Policy
from sparsetrain.policies.base import DynamicPolicy
from sparsetrain.policies.group import TargetGroup
from sparsetrain.recipe import Assignment

_STORAGES = ("masked", "csr", "auto")


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
    if storage != "masked" and _has_peers():
        raise ValueError(
            f"storage {storage!r} trains in one process: its gradients of inactive weights are not "
            "averaged over ranks; use storage='masked' in a distributed run"
        )


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


def check_built(policy: Policy, group: TargetGroup) -> None:
    """Refuse layers that were built sparse with another number of connections than allocated.

    A policy that starts dense takes away connections, so it may begin with any number.
    """
    built = [target for target in group.targets if target.built]
    if not built or (isinstance(policy, DynamicPolicy) and policy.starts_dense):
        return
    counts = policy.counts(group)
    for target in built:
        if counts[target.name] != target.active:
            raise ValueError(
                f"{target.name} is built with {target.active:,} of {target.numel:,} connections "
                f"and the policy allocates {counts[target.name]:,}: give the policy "
                "allocation='as_built' (and no sparsity), or build the layer with that density"
            )


def copy_to_device_of(value: Any, group: TargetGroup) -> Any:
    """A copy of a saved memory entry, tensors on the device of the group's weights."""
    if isinstance(value, torch.Tensor):
        return value.to(group.targets[0].param.device, copy=True)
    return value


def _has_peers() -> bool:
    distributed = torch.distributed
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


def _type(value: Any) -> str:
    return type(value).__name__
