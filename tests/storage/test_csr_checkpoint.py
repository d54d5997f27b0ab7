"""Checkpoints of weights held by their non-zeros: exact to resume, refused when damaged."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from runs import OPTIMIZERS, SmallNet, same, weights
from sparse_twins import (
    agree,
    backward,
    dense_weight,
    held,
    measuring,
    policies,
    train,
    worth_it_from,
    wrap,
)
from torch import Tensor, nn

import sparsetrain as st
from sparsetrain.storage.csr.layers import SparseLinear
from sparsetrain.storage.csr.target import CsrTarget

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


# Resuming.


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


# How weights are held, in the middle of its changing.


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


# Damage.


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
