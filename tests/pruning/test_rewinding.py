"""Snapshots: everything that training depends on comes back."""

from __future__ import annotations

import io
import random
from typing import Any

import numpy as np
import pytest
import torch
from runs import SmallNet, backward
from torch import nn

import sparsetrain as st


def train(model: nn.Module, optimizer: Any, scheduler: Any, steps: int) -> list[float]:
    drawn = []
    for step in range(steps):
        backward(model, step)
        optimizer.step()
        scheduler.step()
        drawn.append(random.random() + float(np.random.rand()) + float(torch.rand(())))  # noqa: NPY002
    return drawn


def made(policy: st.Policy | None = None) -> tuple[nn.Module, Any, Any]:
    model = SmallNet()
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.01)
    if policy is not None:
        optimizer = st.SparseOptimizer(optimizer, model, policy)
    return model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


def test_training_repeats_itself_after_rewinding() -> None:
    model, optimizer, scheduler = made()
    train(model, optimizer, scheduler, 3)
    snapshot = st.Snapshot.take(model, optimizer, scheduler)
    first = train(model, optimizer, scheduler, 4)
    end = {k: v.clone() for k, v in model.state_dict().items()}
    st.rewind(snapshot, model, optimizer, scheduler)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * 0.9**3)
    assert train(model, optimizer, scheduler, 4) == first
    assert all(torch.equal(v, end[k]) for k, v in model.state_dict().items())


def test_a_snapshot_does_not_change_with_training() -> None:
    model, optimizer, scheduler = made()
    train(model, optimizer, scheduler, 2)
    snapshot = st.Snapshot.take(model, optimizer, scheduler)
    saved = io.BytesIO()
    torch.save(snapshot.to_dict(), saved)
    train(model, optimizer, scheduler, 2)
    st.rewind(snapshot, model, optimizer, scheduler)
    train(model, optimizer, scheduler, 2)
    end = {k: v.clone() for k, v in model.state_dict().items()}
    saved.seek(0)
    loaded = st.Snapshot(**torch.load(saved, weights_only=True))
    st.rewind(loaded, model, optimizer, scheduler)
    train(model, optimizer, scheduler, 2)
    assert all(torch.equal(v, end[k]) for k, v in model.state_dict().items())


def test_masks_of_now_stay() -> None:
    model, optimizer, scheduler = made(st.Gradual(sparsity=0.8, total_steps=8, update={"every": 1}))
    train(model, optimizer, scheduler, 2)
    snapshot = st.Snapshot.take(model, optimizer, scheduler)
    early = {k: v.clone() for k, v in model.state_dict().items()}
    train(model, optimizer, scheduler, 6)
    masks = optimizer.masks()
    st.rewind(snapshot, model, optimizer, scheduler)
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        assert torch.equal(weight, torch.where(mask, early[name], 0.0))
        assert torch.equal(optimizer.masks()[name], mask)
        state = optimizer.state[weight]
        assert int(state["step"]) == 2
        assert not state["exp_avg"][~mask].any()
        assert state["exp_avg"][mask].any()


def test_what_does_not_fit_is_named() -> None:
    model, optimizer, scheduler = made()
    snapshot = st.Snapshot.take(model, optimizer)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        model.head.weight.add_(1.0)  # type: ignore[operator,union-attr]
    with pytest.raises(ValueError, match=r"states of 1 objects .* not of 2"):
        st.rewind(snapshot, model, optimizer, scheduler)
    assert not torch.equal(model.state_dict()["head.weight"], before["head.weight"])
    other = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"another model: 0\.bias, 0\.weight, conv\.bias"):
        st.rewind(snapshot, other)
    wide = SmallNet()
    wide.head = nn.Linear(16, 4)
    with pytest.raises(ValueError, match=r"head.weight has shape \(3, 16\) there and \(4, 16\)"):
        st.rewind(snapshot, wide)
    with pytest.raises(ValueError, match="a list has no state_dict"):
        st.Snapshot.take(model, [])
    st.rewind(snapshot, model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
