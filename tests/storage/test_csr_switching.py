"""Checkpoints and changes of how weights are held."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

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
from runs import OPTIMIZERS
from sparse_twins import (
    agree,
    held,
    measuring,
    train,
    worth_it_from,
    wrap,
)
from torch import nn

import sparsetrain as st
from sparsetrain.storage.csr.layers import SparseLinear


@pytest.mark.parametrize("stop", range(STEPS + 1))
def test_gradual_pruning_that_becomes_sparse_on_its_way(stop: int) -> None:
    with worth_it_from(0.5):
        whole_model, whole = wrap("csr", "gradual", worth=0.5)
        ways: list[dict[str, str]] = []
        for step in range(STEPS):
            if step == stop:
                state = saved(whole_model, whole)
            ways.append(held(whole))
            train(whole_model, whole, step, step + 1)
        if stop == STEPS:
            state = saved(whole_model, whole)
        assert set(ways[0].values()) == {"masked"}
        assert ways[-1]["conv.weight"] == ways[-1]["hidden.weight"] == "csr"
        model, optimizer = wrap("csr", "gradual", seed=7, worth=0.5)
        resume(model, optimizer, state)
        assert held(optimizer) == (ways[stop] if stop < STEPS else held(whole))
        train(model, optimizer, stop, STEPS)
        identical(model, optimizer, whole_model, whole)


@contextmanager
def as_in(storage: str) -> Iterator[None]:
    with ExitStack() as stack:
        if storage == "auto":
            stack.enter_context(measuring(lambda layer, density: density < 0.5))
        else:
            stack.enter_context(worth_it_from(1.0))
        yield


@pytest.mark.parametrize("stop", [0, 1, 2, 6, 9])
@pytest.mark.parametrize("policy", ["static", "set", "rigl", "snfs", "gradual"])
def test_auto_storage_is_resumed_exactly(policy: str, stop: int) -> None:
    with as_in("auto"):
        whole_model, whole = wrap("auto", policy)
        train(whole_model, whole, 0, stop)
        state = saved(whole_model, whole)
        model, optimizer = wrap("auto", policy, seed=7)
        resume(model, optimizer, state)
        assert held(optimizer) == held(whole)
        for step in range(stop, STEPS):
            train(whole_model, whole, step, step + 1)
            train(model, optimizer, step, step + 1)
            assert held(optimizer) == held(whole), step
        identical(model, optimizer, whole_model, whole)
        if policy == "rigl":
            assert list(held(whole).values()) == ["csr", "csr", "masked"]


@pytest.mark.parametrize("stop", range(2, 26, 3))
def test_auto_storage_measures_again_when_it_would_have(stop: int) -> None:
    """Whenever a run is resumed, layers turn sparse at the same step."""
    policy = st.Gradual(sparsity=0.9, total_steps=30, update={"every": 1}, shape="linear")
    with as_in("auto"):
        whole_model, whole = wrap("auto", policy)
        train(whole_model, whole, 0, stop)
        state = saved(whole_model, whole)
        model, optimizer = wrap("auto", policy, seed=7)
        resume(model, optimizer, state)
        for step in range(stop, 30):
            train(whole_model, whole, step, step + 1)
            train(model, optimizer, step, step + 1)
            assert held(optimizer) == held(whole), step
        identical(model, optimizer, whole_model, whole)


@pytest.mark.parametrize("policy", EVERY_POLICY)
@pytest.mark.parametrize("storage", ["csr", "auto"])
def test_a_masked_checkpoint_goes_on_by_non_zeros(storage: str, policy: str) -> None:
    masked_model, masked = wrap("masked", policy, "adam")
    train(masked_model, masked, 0, 5)
    state = saved(masked_model, masked)
    with as_in(storage):
        model, optimizer = wrap(storage, policy, "adam", seed=7)
        resume(model, optimizer, state)
        agree(masked, optimizer, within=0.0)
        for step in range(5, STEPS):
            losses = [
                train(*run, step, step + 1)[0]
                for run in ((masked_model, masked), (model, optimizer))
            ]
            assert losses[0] == pytest.approx(losses[1], abs=1e-9)
        agree(masked, optimizer, within=1e-7)
        if policy in ("rigl", "set", "snfs"):
            assert "csr" in held(optimizer).values()
        again = saved(model, optimizer)
        other, resumed = wrap(storage, policy, "adam", seed=8)
        resume(other, resumed, again)
        identical(model, optimizer, other, resumed)


@pytest.mark.parametrize("policy", ["rigl", "gradual", "snfs"])
def test_a_checkpoint_by_non_zeros_goes_on_in_auto_storage_and_where_csr_pays_later(
    policy: str,
) -> None:
    whole_model, whole = wrap("csr", policy, "adam")
    train(whole_model, whole, 0, 5)
    state = saved(whole_model, whole)
    for storage, worth in (("auto", 1.0), ("csr", 0.01)):
        with measuring(lambda layer, density: False), worth_it_from(worth):
            model, optimizer = wrap(storage, policy, "adam", seed=7, worth=worth)
            assert set(held(optimizer).values()) == {"masked"}
            resume(model, optimizer, copy.deepcopy(state))
            identical(model, optimizer, whole_model, whole)
            train(model, optimizer, 5, STEPS)
            optimizer.finalize()
            assert type(model.hidden) is nn.Linear


def test_a_masked_run_refuses_a_checkpoint_by_non_zeros() -> None:
    first_model, first = wrap("csr", "rigl")
    train(first_model, first, 0, 5)
    model, optimizer = wrap("masked", "rigl", seed=7)
    train(model, optimizer, 0, 3)
    before = snapshot(model, optimizer)
    with pytest.raises(
        ValueError, match=r"conv\.weight is held as csr in the checkpoint and as masked here"
    ):
        optimizer.load_state_dict(first.state_dict())
    assert is_unchanged(before, model, optimizer)


def test_layers_that_cannot_be_sparse_here_refuse_it_too() -> None:
    _, first = wrap("csr", "static", "sgd")
    model, optimizer = wrap("csr", "static", "sgd", dtype=torch.bfloat16)
    assert set(held(optimizer).values()) == {"masked"}
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=r"conv\.weight is held as csr in the checkpoint"):
        optimizer.load_state_dict(first.state_dict())
    assert is_unchanged(before, model, optimizer)


@pytest.mark.skipif("muon" not in OPTIMIZERS, reason="this torch has no Muon")
def test_an_optimizer_for_matrices_refuses_a_checkpoint_of_vectors() -> None:
    """A checkpoint cannot make it train what it cannot train."""
    first_model, first = wrap("csr", "static", "sgd")
    train(first_model, first, 0, 2)
    state = first.state_dict()
    model, optimizer = wrap("csr", "static", "muon")
    entries = state["sparsetrain"]["targets"]
    mine = copy.deepcopy(optimizer.state_dict())
    mine["sparsetrain"]["targets"] = {n: entries[n] for n in optimizer.targets}
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=r"hidden\.weight"):
        optimizer.load_state_dict(mine)
    assert is_unchanged(before, model, optimizer)


def built_sparse(seed: int = 0) -> tuple[nn.Module, st.SparseOptimizer]:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(
        nn.Flatten(),
        SparseLinear(64, 16, 0.2, generator=generator, dtype=torch.float64),
        nn.ReLU(),
        SparseLinear(16, 3, 0.5, generator=generator, dtype=torch.float64),
    )
    policy = st.SET(allocation="as_built", total_steps=STEPS, update={"every": 3})
    base = torch.optim.Adam(model.parameters(), lr=0.01)
    return model, st.SparseOptimizer(base, model, policy, seed=seed)


@pytest.mark.parametrize("optimizer_first", [True, False])
def test_layers_that_were_built_sparse_resume(optimizer_first: bool) -> None:
    whole_model, whole = built_sparse()
    train(whole_model, whole, 0, 5)
    state = saved(whole_model, whole)
    model, optimizer = built_sparse(3)
    if not optimizer_first:
        model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if optimizer_first:
        model.load_state_dict(state["model"])
    train(model, optimizer, 5, STEPS)
    train(whole_model, whole, 5, STEPS)
    identical(model, optimizer, whole_model, whole)


def test_a_layer_that_was_built_sparse_takes_no_mask() -> None:
    model, optimizer = built_sparse()
    state = copy.deepcopy(optimizer.state_dict())
    entry = state["sparsetrain"]["targets"]["1.weight"]
    entry.pop("columns"), entry.pop("row_pointers")
    entry |= {"storage": "masked", "mask": torch.zeros(128, dtype=torch.uint8)}
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=r"1\.weight is held as masked .* and as csr here"):
        optimizer.load_state_dict(state)
    assert is_unchanged(before, model, optimizer)
