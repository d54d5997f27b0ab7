"""What must hold after every step, for every optimizer and every policy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from runs import (
    LATENT,
    OPTIMIZERS,
    POLICIES,
    STEPS,
    backward,
    same,
    train,
    weights,
    wrap,
)

import sparsetrain as st
from sparsetrain import testing
from sparsetrain.testing import strategies

HOLDING = (
    "counts_are_exact",
    "inactive_state_is_zero",
    "inactive_weights_are_zero",
    "events_tell_what_changed",
    "grown_weights_start_fresh",
)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_counts_and_fresh_growth(name: str, policy: str) -> None:
    report = testing.check_policy(POLICIES[policy], optimizer=name, only=HOLDING)
    silent = {"grown_weights_start_fresh"} if policy not in ("set", "rigl", "snfs") else set()
    silent |= {"inactive_state_is_zero"} if policy in LATENT else set()
    silent |= {"events_tell_what_changed"} if policy == "static" else set()
    assert set(report.left_out) == silent

    model, optimizer = wrap(name, policy)
    if name == "muon":
        assert set(optimizer.targets) == {"hidden.weight", "head.weight"}
    counts = {n: t.active for n, t in optimizer.targets.items()}
    falling = [optimizer.sparsity()]
    for step in range(STEPS):
        train(model, optimizer, step, step + 1)
        assert optimizer.step_count == step + 1
        now = {n: t.active for n, t in optimizer.targets.items()}
        if policy in ("static", "set", "rigl", "nm_sparse"):
            assert now == counts
        if policy == "snfs":
            assert sum(now.values()) == sum(counts.values())
        if policy == "gradual":
            assert optimizer.sparsity() >= falling[-1]
            falling.append(optimizer.sparsity())
    total = sum(t.numel for t in optimizer.targets.values())
    active = sum(t.active for t in optimizer.targets.values())
    assert active == (total // 4 if policy == "nm_sparse" else round(0.2 * total))
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["momentum", "adamw_amsgrad", "adafactor", "rprop", "lbfgs"])
def test_resume_is_exact(name: str, policy: str) -> None:
    testing.check_policy(POLICIES[policy], optimizer=name, only="resumed_runs_are_the_same")


@settings(max_examples=15)
@given(
    stop=some.integers(0, STEPS),
    policy=some.sampled_from(sorted(POLICIES)),
    order=some.sampled_from(["optimizer first", "model first", "model before wrapping"]),
)
def test_resume_in_any_order_at_any_step(stop: int, policy: str, order: str) -> None:
    whole_model, whole = wrap("momentum", policy)
    train(whole_model, whole, 0, STEPS)
    first_model, first = wrap("momentum", policy)
    train(first_model, first, 0, stop)
    model_state, state = weights(first_model), first.state_dict()

    model, optimizer = wrap("momentum", policy, seed=7)
    if order == "model before wrapping":
        model.load_state_dict(model_state)
        base = OPTIMIZERS["momentum"](model.parameters())
        optimizer = st.SparseOptimizer(base, model, POLICIES[policy], seed=8)
        optimizer.load_state_dict(state)
    elif order == "model first":
        model.load_state_dict(model_state)
        optimizer.load_state_dict(state)
    else:
        optimizer.load_state_dict(state)
        model.load_state_dict(model_state)
    train(model, optimizer, stop, STEPS)
    assert same(weights(model), weights(whole_model))


@pytest.mark.parametrize("policy", ["static", "set", "rigl", "gradual"])
@pytest.mark.parametrize("name", ["momentum", "adamw_amsgrad", "muon"])
def test_nan_gradients_of_inactive_weights_change_nothing(name: str, policy: str) -> None:
    if name not in OPTIMIZERS:
        pytest.skip("this torch has no Muon")
    only = "gradients_outside_the_mask_do_not_leak"
    assert testing.check_policy(POLICIES[policy], optimizer=name, only=only).held == (only,)


@pytest.mark.parametrize("policy", ["rigl", "snfs"])
def test_nan_growth_score_names_the_layer_and_changes_nothing(policy: str) -> None:
    model, optimizer = wrap("momentum", policy)
    whole_model, whole = wrap("momentum", policy)
    train(model, optimizer, 0, 1)
    train(whole_model, whole, 0, 1)
    backward(model, 1)
    middle = optimizer.targets["hidden.weight"]  # conv is decided before it
    middle.param.grad[~middle.mask] = float("nan")
    memory = {k: v.clone() for _, g in optimizer._keeper.groups for k, v in g.memory.items()}
    before, masks = weights(model), optimizer.masks()
    if policy == "snfs":
        for _, group in optimizer._keeper.groups:
            group.memory["hidden.weight"][~middle.mask] = float("nan")
    with pytest.raises(ValueError, match=r"hidden\.weight"):
        optimizer.update_masks()
    assert same(weights(model), before) and same(optimizer.masks(), masks)
    for _, group in optimizer._keeper.groups:
        group.memory.update(memory)
    train(model, optimizer, 1, STEPS)
    train(whole_model, whole, 1, STEPS)
    assert same(dict(model.named_parameters()), dict(whole_model.named_parameters()))


@pytest.mark.parametrize("n, m", [(1, 4), (2, 4), (1, 2)])
def test_n_m_holds_in_every_group(n: int, m: int) -> None:
    model, optimizer = wrap("momentum", st.NMSparse(n=n, m=m))
    for step in range(5):
        train(model, optimizer, step, step + 1)
        conv, hidden = model.conv.weight.detach(), model.hidden.weight.detach()
        assert ((conv.unflatten(1, (-1, m)) != 0).sum(2) <= n).all()
        assert ((hidden.unflatten(1, (-1, m)) != 0).sum(2) <= n).all()


@pytest.mark.parametrize("policy", POLICIES)
def test_finalize_leaves_a_plain_dense_model(policy: str) -> None:
    only = ["finalize_leaves_a_plain_model", "state_dict_names_stay"]
    report = testing.check_policy(POLICIES[policy], optimizer="momentum", only=only)
    assert set(report.held) == set(only)
    model, optimizer = wrap("momentum", policy)
    train(model, optimizer, 0, 2)
    optimizer.finalize()
    with pytest.raises(RuntimeError, match="finalized"):
        optimizer.step()


@settings(max_examples=25)
@given(
    sparsity=strategies.sparsities(0.97),
    policy=some.sampled_from(["static", "set", "rigl", "snfs", "gradual"]),
    allocation=strategies.allocations() | some.just({"kind": "global"}),
    seed=some.integers(0, 1000),
)
def test_counts_are_exact_for_any_sparsity_and_allocation(
    sparsity: float, policy: str, allocation: dict[str, Any], seed: int
) -> None:
    data = POLICIES[policy].model_dump() | {"sparsity": sparsity, "allocation": allocation}
    model, optimizer = wrap("momentum", type(POLICIES[policy]).model_validate(data), seed)
    train(model, optimizer, 0, STEPS)
    targets = list(optimizer.targets.values())
    first = targets[0].numel if allocation["kind"] == "uniform_first_dense" else 0
    shared = sum(t.numel for t in targets) - first
    assert sum(t.active for t in targets) == round((1 - sparsity) * shared) + first
    assert all(t.active >= 1 for t in targets)


@settings(max_examples=15)
@given(
    policy=strategies.policies(["static", "set", "rigl", "snfs", "gradual"]),
    seed=some.integers(0, 1000),
)
def test_counts_and_structures_hold_for_any_policy(policy: st.Policy, seed: int) -> None:
    only = ["counts_are_exact", "structures_hold", "inactive_weights_are_zero"]
    testing.check_policy(policy, optimizer="momentum", seed=seed, only=only)
