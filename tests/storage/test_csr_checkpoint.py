"""Runs in csr storage are resumed exactly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from csr_checkpoints import (
    EVERY_POLICY,
    STEPS,
    identical,
    resume,
    saved,
)
from hypothesis import given, settings
from hypothesis import strategies as some
from runs import same
from sparse_twins import (
    dense_weight,
    train,
    wrap,
)

from sparsetrain.storage.csr.target import CsrTarget


@pytest.mark.parametrize("order", ["optimizer first", "model first"])
@pytest.mark.parametrize("policy", EVERY_POLICY)
@pytest.mark.parametrize("name", ["adamw_amsgrad", "momentum"])
def test_resume_is_exact(name: str, policy: str, order: str) -> None:
    whole_model, whole = wrap("csr", policy, name)
    losses = train(whole_model, whole, 0, STEPS)
    stop = 1 + (len(name) + len(policy)) % (STEPS - 2)
    first_model, first = wrap("csr", policy, name)
    early = train(first_model, first, 0, stop)
    state = saved(first_model, first)
    model, optimizer = wrap("csr", policy, name, seed=7)
    if order == "model first":
        model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if order == "optimizer first":
        model.load_state_dict(state["model"])
    identical(model, optimizer, first_model, first)
    assert early + train(model, optimizer, stop, STEPS) == losses
    identical(model, optimizer, whole_model, whole)


@settings(max_examples=25)
@given(
    stop=some.integers(0, STEPS),
    policy=some.sampled_from(EVERY_POLICY),
    optimizer_first=some.booleans(),
    name=some.sampled_from(["sgd", "adam", "rprop", "adagrad"]),
)
def test_resume_in_any_order_at_any_step(
    stop: int, policy: str, optimizer_first: bool, name: str
) -> None:
    whole_model, whole = wrap("csr", policy, name)
    train(whole_model, whole, 0, stop)
    state = saved(whole_model, whole)
    train(whole_model, whole, stop, STEPS)
    model, optimizer = wrap("csr", policy, name, seed=7)
    loads: list[Callable[[], Any]] = [
        lambda: optimizer.load_state_dict(state["optimizer"]),
        lambda: model.load_state_dict(state["model"]),
    ]
    for load in loads if optimizer_first else reversed(loads):
        load()
    train(model, optimizer, stop, STEPS)
    identical(model, optimizer, whole_model, whole)


@pytest.mark.parametrize("policy", ["rigl", "gradual"])
def test_resume_is_exact_in_float32(policy: str) -> None:
    whole_model, whole = wrap("csr", policy, dtype=torch.float32)
    train(whole_model, whole, 0, 5)
    state = saved(whole_model, whole)
    model, optimizer = wrap("csr", policy, seed=7, dtype=torch.float32)
    resume(model, optimizer, state)
    assert train(whole_model, whole, 5, STEPS) == train(model, optimizer, 5, STEPS)
    identical(model, optimizer, whole_model, whole)


@pytest.mark.parametrize("policy", EVERY_POLICY)
def test_a_run_can_be_set_back(policy: str) -> None:
    """The same objects take an earlier state, and a later one."""
    model, optimizer = wrap("csr", policy, "adam")
    train(model, optimizer, 0, 4)
    early = saved(model, optimizer)
    losses = train(model, optimizer, 4, STEPS)
    late = saved(model, optimizer)
    resume(model, optimizer, early)
    assert train(model, optimizer, 4, STEPS) == losses
    resume(model, optimizer, early)
    resume(model, optimizer, late)
    twin_model, twin = wrap("csr", policy, "adam")
    resume(twin_model, twin, late)
    identical(model, optimizer, twin_model, twin)


def test_the_callers_dict_is_left_alone() -> None:
    model, optimizer = wrap("csr", "rigl")
    train(model, optimizer, 0, 5)
    state = saved(model, optimizer)
    before = copy.deepcopy(state)
    other, again = wrap("csr", "rigl", seed=7)
    resume(other, again, state)
    train(other, again, 5, STEPS)
    assert same(state["model"], before["model"])
    entries = state["optimizer"]["sparsetrain"]["targets"]
    for name, entry in before["optimizer"]["sparsetrain"]["targets"].items():
        assert entry.keys() == entries[name].keys()
        assert torch.equal(entry["columns"], entries[name]["columns"])


def test_what_is_saved_is_as_small_as_what_is_held() -> None:
    model, optimizer = wrap("csr", "rigl", "adam")
    train(model, optimizer, 0, 5)
    state = optimizer.state_dict()
    for name, target in optimizer.targets.items():
        assert isinstance(target, CsrTarget)
        entry = state["sparsetrain"]["targets"][name]
        assert entry.keys() == {"shape", "storage", "row_pointers", "columns"}
        assert entry["shape"] == list(target.shape) and entry["storage"] == "csr"
        assert entry["columns"].shape == (target.active,)
    tensors = [t for s in state["state"].values() for t in s.values() if t.dim()]
    assert {tuple(t.shape) for t in tensors} == {tuple(p.shape) for p in model.parameters()}
    assert state["sparsetrain"]["version"] >= 2


def test_the_optimizers_state_alone_brings_the_pattern() -> None:
    """What is in both patterns keeps its value, the rest begins at 0."""
    first_model, first = wrap("csr", "set")
    train(first_model, first, 0, 5)
    model, optimizer = wrap("csr", "set", seed=7)
    before = {name: dense_weight(t) for name, t in optimizer.targets.items()}
    optimizer.load_state_dict(first.state_dict())
    assert same(optimizer.masks(), first.masks())
    for name, target in optimizer.targets.items():
        expected = torch.where(target.mask, before[name], 0.0)
        assert torch.equal(dense_weight(target), expected)
    train(model, optimizer, 5, STEPS)
