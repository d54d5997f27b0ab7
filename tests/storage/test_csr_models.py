"""The end of training, layers that were built sparse, and what else is written to a model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from csr_training import DYNAMIC, EVERY_POLICY, is_as_it_was, snapshot
from runs import POLICIES, SmallNet, same, weights
from sparse_twins import (
    backward,
    policies,
    record,
    train,
    why,
    worth_it_from,
    wrap,
)
from torch import Tensor, nn

import sparsetrain as st
from sparsetrain.storage.csr.layers import SparseConv2d, SparseLayer, SparseLinear
from sparsetrain.storage.csr.target import CsrTarget


@pytest.mark.parametrize("policy", EVERY_POLICY)
@pytest.mark.parametrize("optimizer", ["momentum", "adam", "adagrad"])
def test_finalize_leaves_the_dense_model_of_the_masked_run(policy: str, optimizer: str) -> None:
    made = [wrap(storage, policy, optimizer) for storage in ("masked", "csr")]
    original = SmallNet()
    for model, wrapped in made:
        train(model, wrapped, 0, 14)
    expected, masks = made[1][0].eval()(torch.ones(1, 4, 4, 4).double()), made[1][1].masks()
    for model, wrapped in made:
        model.train()
        wrapped.finalize()
    (masked, _), (model, wrapped) = made
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
    assert list(model.state_dict()) == list(original.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in original.named_parameters()]
    for name, value in masked.state_dict().items():
        assert torch.allclose(model.state_dict()[name], value, rtol=0, atol=1e-9)
    for name, mask in masks.items():
        assert (model.get_parameter(name).detach()[~mask] == 0).all()
    assert torch.allclose(model.eval()(torch.ones(1, 4, 4, 4).double()), expected)
    held_now = [id(p) for group in wrapped.base.param_groups for p in group["params"]]
    assert held_now == [id(p) for p in model.parameters()]
    assert set(wrapped.base.state) <= set(model.parameters())
    assert not wrapped.base._optimizer_step_post_hooks
    with pytest.raises(RuntimeError, match="finalized"):
        wrapped.step()
    model.train()
    backward(model, 14)
    before = weights(model)
    wrapped.base.step()  # the plain optimizer goes on
    assert not same(before, weights(model))
    for param in model.parameters():
        for state in wrapped.base.state[param].values():
            assert not isinstance(state, Tensor) or state.shape in (param.shape, ())


@pytest.mark.parametrize("policy", ["rigl", "snfs", "gradual"])
def test_finalize_may_leave_the_layers_sparse(policy: str) -> None:
    model, wrapped = wrap("csr", policy)
    train(model, wrapped, 0, 13)
    x = torch.ones(1, 4, 4, 4).double()
    expected = model.eval()(x)
    values = [p.shape for p in model.parameters()]
    wrapped.finalize(dense=False)
    assert type(model.conv) is SparseConv2d
    assert type(model.hidden) is type(model.head) is SparseLinear
    assert torch.equal(model(x), expected)
    assert all(m.tape is None for m in model.modules() if isinstance(m, SparseLayer))
    model.train()
    backward(model, 14)
    wrapped.base.step()
    assert [p.shape for p in model.parameters()] == values
    assert not any(m._forward_pre_hooks for m in model.modules())
    pickle.loads(pickle.dumps(model))(x)


def test_a_finalized_sparse_model_is_wrapped_again_as_it_was_built() -> None:
    model, wrapped = wrap("csr", "rigl")
    train(model, wrapped, 0, 13)
    counts = {name: t.active for name, t in wrapped.targets.items()}
    wrapped.finalize(dense=False)
    policy = st.SET(allocation="as_built", **DYNAMIC)
    again = st.SparseOptimizer(wrapped.base, model, policy)
    assert {name: t.active for name, t in again.targets.items()} == counts
    train(model, again, 0, 12)
    again.finalize()
    assert type(model.hidden) is SparseLinear


def test_a_dense_rest_of_the_model_is_what_it_was() -> None:
    recipe = {
        "policy": policies(14, 3)["rigl"].model_dump(),
        "rules": [{"match": "head", "dense": True}],
    }
    model = SmallNet().double()
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with worth_it_from(1.0):
        optimizer = st.SparseOptimizer(base, model, recipe, storage="csr")
    train(model, optimizer, 0, 14)
    assert isinstance(model.head, nn.Linear)
    assert not isinstance(model.head, SparseLayer)
    copy.deepcopy(model)(torch.ones(1, 4, 4, 4).double())
    pickle.loads(pickle.dumps(model))(torch.ones(1, 4, 4, 4).double())
    optimizer.finalize()
    assert type(model.head) is type(model.hidden) is nn.Linear


# Layers that were built sparse.


def built(density: float = 0.2, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Flatten(),
            SparseLinear(64, 32, density, generator=generator, dtype=dtype),
            nn.ReLU(),
            SparseLinear(32, 16, 2 * density, generator=generator, dtype=dtype),
            nn.ReLU(),
            nn.Linear(16, 3, dtype=dtype),
        )


@pytest.mark.parametrize("storage", ["masked", "csr", "auto"])
@pytest.mark.parametrize("kind", ["set", "rigl", "snfs", "static"])
def test_networks_that_were_built_sparse_train(kind: str, storage: str) -> None:
    model = built()
    data: dict[str, Any] = {"kind": kind, "allocation": "as_built"}
    if kind != "static":
        data |= {"total_steps": 14, "update": {"every": 2}}
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    before = weights(model)
    optimizer = st.SparseOptimizer(base, model, data, storage=storage)
    assert same(weights(model), before)
    counts = {name: t.active for name, t in optimizer.targets.items()}
    assert counts == {"1.weight": 410, "3.weight": 205, "5.weight": 48}
    assert why(optimizer)["1.weight"] == why(optimizer)["3.weight"] == "built sparse"
    masks = optimizer.masks()
    for step in range(14):
        train(model, optimizer, step, step + 1)
        now = {name: t.active for name, t in optimizer.targets.items()}
        if kind == "snfs":
            assert sum(now.values()) == sum(counts.values())
        else:
            assert now == counts
    assert same(optimizer.masks(), masks) == (kind == "static")
    optimizer.finalize()
    assert type(model[1]) is type(model[3]) is SparseLinear


def test_another_number_of_connections_is_refused_by_name_and_changes_nothing() -> None:
    model = built()
    base = torch.optim.SGD(model.parameters(), lr=0.05)
    before = snapshot(model, base)
    for allocation in ("uniform", "erdos_renyi_kernel"):
        policy = st.SET(sparsity=0.9, allocation=allocation, **DYNAMIC)
        with (
            worth_it_from(1.0),
            pytest.raises(
                ValueError, match=r"1\.weight is built with 410 of 2,048 connections.*as_built"
            ),
        ):
            st.SparseOptimizer(base, model, policy, storage="csr")
        assert is_as_it_was(before, model, base)


def test_the_number_of_connections_that_is_allocated_is_accepted() -> None:
    model = built()
    base = torch.optim.SGD(model.parameters(), lr=0.05)
    recipe = {
        "rules": [
            {"match": "5", "dense": True},
            {
                "match": "*",
                "policy": {
                    "kind": "set",
                    "allocation": {
                        "kind": "explicit",
                        "densities": {"1.weight": 410 / 2048, "3.weight": 205 / 512},
                    },
                    **DYNAMIC,
                },
            },
        ]
    }
    optimizer = st.SparseOptimizer(base, model, recipe)
    assert {n: t.active for n, t in optimizer.targets.items()} == {"1.weight": 410, "3.weight": 205}
    train(model, optimizer, 0, 12)


def test_gradual_pruning_goes_on_from_what_was_built() -> None:
    model = built()
    base = torch.optim.SGD(model.parameters(), lr=0.05)
    policy = st.Gradual(sparsity=0.95, total_steps=14, update={"every": 1})
    optimizer = st.SparseOptimizer(base, model, policy)
    falling = [optimizer.sparsity()]
    for step in range(14):
        train(model, optimizer, step, step + 1)
        assert optimizer.sparsity() >= falling[-1]
        falling.append(optimizer.sparsity())
    assert falling[-1] == pytest.approx(0.95, abs=1e-3) and len(set(falling)) > 3
    assert optimizer.targets["1.weight"].active < 410


@pytest.mark.parametrize("policy", ["dynamic_network_surgery", "nm_sparse"])
def test_policies_of_latent_weights_refuse_what_was_built_sparse(policy: str) -> None:
    model = built()
    base = torch.optim.SGD(model.parameters(), lr=0.05)
    before = snapshot(model, base)
    with pytest.raises(ValueError, match=r"cannot train 1\.weight, which is built sparse.*latent"):
        st.SparseOptimizer(base, model, POLICIES[policy])
    assert is_as_it_was(before, model, base)


@pytest.mark.parametrize(
    ("selector", "names"),
    [
        ({"module_type": "Linear"}, {"1.weight", "3.weight", "5.weight"}),
        ({"module_type": "SparseLinear"}, {"1.weight", "3.weight"}),
        ({"match": "3.weight"}, {"3.weight"}),
        ({"match": "3"}, {"3.weight"}),
        ({"regex": r"^[13]\.weight$"}, {"1.weight", "3.weight"}),
    ],
)
def test_rules_speak_of_them_as_of_dense_layers(selector: dict[str, str], names: set[str]) -> None:
    model = built()
    policy = {"kind": "set", "allocation": "as_built", **DYNAMIC}
    optimizer = st.SparseOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        {"rules": [selector | {"policy": policy}]},
    )
    assert set(optimizer.targets) == names
    with pytest.raises(ValueError, match=r"values"):
        st.SparseOptimizer(
            torch.optim.SGD(built().parameters(), lr=0.1),
            built(),
            {"rules": [{"match": "1.values", "policy": policy}]},
        )


def test_frozen_values_are_no_target() -> None:
    model = built()
    model[1].values.requires_grad_(False)
    policy = {"kind": "set", "allocation": "as_built", **DYNAMIC}
    optimizer = st.SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, policy)
    assert set(optimizer.targets) == {"3.weight", "5.weight"}
    before = model[1].weight
    train(model, optimizer, 0, 12)
    assert torch.equal(model[1].weight, before)


# What else is written to the model.


def other_state(sparsity: float) -> dict[str, Tensor]:
    model, _ = wrap("csr", st.Static(sparsity=sparsity), seed=3)
    return copy.deepcopy(model.state_dict())


@pytest.mark.parametrize("policy", ["rigl", "set", "snfs", "gradual", "static"])
@pytest.mark.parametrize("due", [True, False])
def test_a_state_of_the_model_with_another_number_of_values(policy: str, due: bool) -> None:
    """Loaded between two steps, just before an update or not: training goes on with it."""
    model, optimizer = wrap("csr", policy)
    first = 3 if due else 4
    train(model, optimizer, 0, first)
    state = other_state(0.7)
    model.load_state_dict(state)
    assert optimizer.state_dict()["sparsetrain"]["targets"]["hidden.weight"]["columns"].numel() == (
        state["hidden.values"].numel()
    )
    assert int(optimizer.masks()["hidden.weight"].sum()) == state["hidden.values"].numel()
    train(model, optimizer, first, 14)
    for target in optimizer.targets.values():
        assert isinstance(target, CsrTarget)
        assert target.param is target.layer.values
        assert target.param.numel() == target.active == target.layer.pattern.nnz
        for state in optimizer.state[target.param].values():
            assert state.shape in ((), (target.active,))
    here = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert here == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("policy", ["set", "rigl"])
def test_a_forced_update_after_a_state_with_another_number_of_values(policy: str) -> None:
    model, optimizer = wrap("csr", policy)
    train(model, optimizer, 0, 2)
    model.load_state_dict(other_state(0.7))
    optimizer.expect_update()
    backward(model, 2)
    optimizer.update_masks()
    train(model, optimizer, 2, 14)


def test_moving_the_model_to_another_dtype_in_the_middle() -> None:
    for policy in ("rigl", "set", "gradual", "snfs"):
        model, optimizer = wrap("csr", policy, "sgd", dtype=torch.float32)
        train(model, optimizer, 0, 5)
        model.double()
        train(model, optimizer, 5, 14)
        assert all(t.param.dtype == torch.float64 for t in optimizer.targets.values())


@contextmanager
def one_thread_more() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_the_number_of_threads_does_not_change_a_run() -> None:
    model, optimizer = wrap("csr", "rigl", dtype=torch.float32)
    other, again = wrap("csr", "rigl", dtype=torch.float32)
    train(model, optimizer, 0, 14)
    with one_thread_more():
        train(other, again, 0, 14)
    for name, value in model.state_dict().items():
        assert torch.allclose(value.double(), other.state_dict()[name].double(), atol=1e-4)


def test_masks_at_every_update_are_recorded_alike() -> None:
    seen = []
    for storage in ("masked", "csr"):
        model, optimizer = wrap(storage, "snfs")
        seen.append(record(optimizer))
        train(model, optimizer, 0, 14)
    assert len(seen[0]) == len(seen[1]) > 2
    assert all(same(a, b) for a, b in zip(*seen, strict=True))
