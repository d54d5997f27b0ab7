"""What tests of checkpoints in csr storage share."""

from __future__ import annotations

import copy
import io
from typing import Any

import torch
from runs import same, weights
from sparse_twins import (
    held,
    policies,
)
from torch import Tensor, nn

import sparsetrain as st

STEPS = 14


EVERY_POLICY = sorted(policies(1))


def saved(model: nn.Module, optimizer: st.SparseOptimizer) -> dict[str, Any]:
    """Through a file, as plain data."""
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def resume(model: nn.Module, optimizer: st.SparseOptimizer, state: dict[str, Any]) -> None:
    optimizer.load_state_dict(state["optimizer"])
    model.load_state_dict(state["model"])


def memories(optimizer: st.SparseOptimizer) -> dict[str, Tensor]:
    groups = optimizer._keeper.groups
    return {f"{n} {key}": v for n, (_, g) in enumerate(groups) for key, v in g.memory.items()}


def identical(
    model: nn.Module, one: st.SparseOptimizer, other_model: nn.Module, other: st.SparseOptimizer
) -> None:
    """Bit for bit: weights, masks, optimizer state, memories, clock."""
    assert same(weights(model), weights(other_model))
    assert same(one.masks(), other.masks()) and held(one) == held(other)
    assert one.step_count == other.step_count
    assert same(memories(one), memories(other))
    for mine, yours in zip(model.parameters(), other_model.parameters(), strict=True):
        state, twin = one.state[mine], other.state[yours]
        assert state.keys() == twin.keys()
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(twin[key])), key


def snapshot(model: nn.Module, optimizer: st.SparseOptimizer) -> Any:
    return (
        [type(m) for m in model.modules()],
        [(name, id(p), p.clone()) for name, p in model.named_parameters()],
        copy.deepcopy(optimizer.state_dict()),
        [[id(p) for p in group["params"]] for group in optimizer.param_groups],
        held(optimizer),
    )


def is_unchanged(before: Any, model: nn.Module, optimizer: st.SparseOptimizer) -> bool:
    return _equal(before, snapshot(model, optimizer))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
