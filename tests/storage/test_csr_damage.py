"""Damaged checkpoints, copies, and what is followed over a run, in csr storage."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from csr_checkpoints import (
    EVERY_POLICY,
    STEPS,
    identical,
    is_unchanged,
    resume,
    saved,
    snapshot,
)
from runs import SmallNet, same, weights
from sparse_twins import (
    backward,
    held,
    train,
    worth_it_from,
    wrap,
)
from torch import nn

import sparsetrain as st
from sparsetrain.storage.csr.layers import SparseLinear


def put(key: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda entry: entry.update({key: change(entry[key])})


DAMAGES = {
    "no columns": lambda entry: entry.pop("columns"),
    "no pointers": lambda entry: entry.pop("row_pointers"),
    "no tensors": put("columns", lambda t: t.tolist()),
    "floats": put("columns", lambda t: t.float()),
    "a matrix": put("columns", lambda t: t[None]),
    "columns cut": put("columns", lambda t: t[:-1]),
    "columns longer": put("columns", lambda t: torch.cat([t, t[-1:]])),
    "columns backwards": put("columns", lambda t: t.flip(0)),
    "columns too high": put("columns", lambda t: t + 30),
    "columns below 0": put("columns", lambda t: t - 1 - t.min()),
    "columns far away": put("columns", lambda t: t.long() + 2**32),
    "pointers cut": put("row_pointers", lambda t: t[:-1]),
    "pointers longer": put("row_pointers", lambda t: torch.cat([t, t[-1:]])),
    "pointers backwards": put("row_pointers", lambda t: t.flip(0)),
    "pointers shifted": put("row_pointers", lambda t: t + 1),
    "pointers below 0": put("row_pointers", lambda t: torch.where(t == t[3], -1, t)),
    "pointers far away": put("row_pointers", lambda t: t.long() + 2**32),
    "no storage of ours": put("storage", lambda word: "coo"),
    "a mask it does not have": put("storage", lambda word: "masked"),
}


def wrapping_pointers(entry: dict[str, Any]) -> None:
    """In 32 bits their differences look as if they rose."""
    pointers = entry["row_pointers"].clone()
    pointers[1], pointers[2:-1] = 2**31 - 1, -2
    entry["row_pointers"] = pointers


@pytest.mark.parametrize("into", ["csr", "masked in csr"])
@pytest.mark.parametrize("damage", [*DAMAGES, "wrapping pointers"])
def test_a_damaged_pattern_is_refused_before_anything_changes(damage: str, into: str) -> None:
    worth = 1.0 if into == "csr" else 0.01
    first_model, first = wrap("csr", "rigl", seed=3)
    train(first_model, first, 0, 4)
    state = copy.deepcopy(first.state_dict())
    state["param_groups"][0]["lr"] = 7.0
    change: Any = DAMAGES.get(damage, wrapping_pointers)
    change(state["sparsetrain"]["targets"]["hidden.weight"])
    model, optimizer = wrap("csr", "rigl", worth=worth)
    train(model, optimizer, 0, 2)
    twin_model, twin = wrap("csr", "rigl", worth=worth)
    train(twin_model, twin, 0, 2)
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=r"hidden\.weight"):
        optimizer.load_state_dict(state)
    assert is_unchanged(before, model, optimizer)
    train(model, optimizer, 2, STEPS)
    train(twin_model, twin, 2, STEPS)
    assert same(weights(model), weights(twin_model))


def without(*path: str) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        *way, last = path
        for key in way:
            state = state[key]
        del state[last]

    return change


@pytest.mark.parametrize(
    "damage",
    [
        without("sparsetrain"),
        without("sparsetrain", "generator"),
        without("sparsetrain", "memories"),
        without("sparsetrain", "targets", "head.weight"),
        lambda state: state["param_groups"][0]["params"].pop(),
        lambda state: state["sparsetrain"]["memories"].append({}),
        lambda state: state["sparsetrain"]["targets"]["conv.weight"].update(shape=[8, 4, 9]),
    ],
)
def test_other_damage_does_not_change_how_weights_are_held(damage: Any) -> None:
    """Here the checkpoint would turn every layer."""
    first_model, first = wrap("csr", "snfs")
    train(first_model, first, 0, 4)
    state = copy.deepcopy(first.state_dict())
    damage(state)
    model, optimizer = wrap("csr", "snfs", worth=0.01)
    assert set(held(optimizer).values()) == {"masked"}
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError):
        optimizer.load_state_dict(state)
    assert is_unchanged(before, model, optimizer)


def test_a_dense_state_is_refused_by_a_model_that_is_held_sparse() -> None:
    model, optimizer = wrap("csr", "rigl")
    with pytest.raises(RuntimeError, match=r'(?s)Missing.*"hidden\.values".*hidden\.weight'):
        model.load_state_dict(SmallNet().double().state_dict())
    train(model, optimizer, 0, 2)


# Copies.


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("policy", EVERY_POLICY)
def test_copies_in_the_middle_of_a_run(policy: str, how: str) -> None:
    model, optimizer = wrap("csr", policy, "adam")
    train(model, optimizer, 0, 5)
    pair: Any = (model, optimizer)
    other, again = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    identical(model, optimizer, other, again)
    before = weights(other)
    losses = train(model, optimizer, 5, STEPS)
    assert same(weights(other), before)
    assert train(other, again, 5, STEPS) == losses
    identical(model, optimizer, other, again)
    for target in again.targets.values():
        assert target.layer in set(other.modules()) and target.param is target.layer.values
    again.finalize()
    assert type(other.hidden) is nn.Linear and type(model.hidden) is SparseLinear


@pytest.mark.parametrize("policy", ["rigl", "snfs"])
def test_a_copy_between_forward_and_step(policy: str) -> None:
    """Gradients are not copied by torch; the copy makes its own and goes on alike."""
    model, optimizer = wrap("csr", policy)
    train(model, optimizer, 0, 3)
    backward(model, 3)
    other, again = copy.deepcopy((model, optimizer))
    optimizer.step()
    backward(other, 3)
    again.step()
    train(model, optimizer, 4, STEPS)
    train(other, again, 4, STEPS)
    assert same(dict(model.named_parameters()), dict(other.named_parameters()))


# What is followed over the run.


def test_explored_weights_and_flops_are_followed_over_a_change_of_storage() -> None:
    rates: dict[str, list[float]] = {"masked": [], "csr": [], "both": []}

    def listen(optimizer: st.SparseOptimizer, name: str) -> None:
        optimizer.register_update_hook(lambda event: rates[name].append(event.exploration_rate))

    for storage in ("masked", "csr"):
        model, optimizer = wrap(storage, "set")
        listen(optimizer, storage)
        train(model, optimizer, 0, STEPS)
        if storage == "masked":
            histories = [optimizer.density_history(name) for name in optimizer.targets]
    model, optimizer = wrap("masked", "set")
    listen(optimizer, "both")
    train(model, optimizer, 0, 5)
    state = saved(model, optimizer)
    with worth_it_from(1.0):
        model, optimizer = wrap("csr", "set", seed=7)
        listen(optimizer, "both")
        resume(model, optimizer, state)
        train(model, optimizer, 5, STEPS)
        assert set(held(optimizer).values()) == {"csr"}
    assert rates["masked"] == rates["csr"] == rates["both"]
    assert [optimizer.density_history(name) for name in optimizer.targets] == histories
