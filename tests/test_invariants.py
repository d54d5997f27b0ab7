"""What must hold after every step, for every optimizer and every policy."""

from __future__ import annotations

import io
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
    shaped_state,
    train,
    weights,
    wrap,
)
from torch import Tensor

import sparsetrain as st

# Fresh state is 0, but for Rprop's step size, Adagrad's start and Adamax's epsilon.
FRESH = {"rprop": {"step_size": 0.01}, "adagrad": {"sum": 0.1}, "adamax": {"exp_inf": 1e-8}}


def check_zeros(optimizer: st.SparseOptimizer) -> None:
    for target in optimizer.targets.values():
        off = ~target.mask
        assert int(target.mask.sum()) == target.active
        assert (target.param.detach()[off] == 0).all(), f"{target.name} is not masked"
        if optimizer.recipe.policy is not None and not optimizer.recipe.policy.latent:
            for key, value in shaped_state(optimizer.base, target.param).items():
                assert (value[off] == 0).all(), f"{key} of {target.name} is not 0"


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_counts_and_fresh_growth(name: str, policy: str) -> None:
    model, optimizer = wrap(name, policy)
    if name == "muon":
        assert set(optimizer.targets) == {"hidden.weight", "head.weight"}
    before: dict[str, Tensor] = optimizer.masks()
    counts = {n: t.active for n, t in optimizer.targets.items()}
    falling = [optimizer.sparsity()]
    updates: list[int] = []

    def seen_by_user(*_: Any) -> None:
        check_zeros(optimizer)

    def on_update(event: st.UpdateEvent) -> None:
        updates.append(event.step)
        for change in event.layers:
            target = optimizer.targets[change.name]
            new = target.mask & ~before[change.name]
            assert int(new.sum()) == change.grown
            assert int((before[change.name] & ~target.mask).sum()) == change.dropped
            assert change.active == target.active
            if policy not in LATENT:
                assert (target.param.detach()[new] == 0).all()
                for key, value in shaped_state(optimizer.base, target.param).items():
                    fresh = torch.tensor(FRESH.get(name, {}).get(key, 0.0))
                    assert (value[new] == fresh).all()
            before[change.name] = target.mask.clone()

    optimizer.register_update_hook(on_update)
    optimizer.base.register_step_post_hook(seen_by_user)
    optimizer.register_step_post_hook(seen_by_user)
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
    assert updates or policy == "static"
    check_zeros(optimizer)
    total = sum(t.numel for t in optimizer.targets.values())
    active = sum(t.active for t in optimizer.targets.values())
    assert active == (total // 4 if policy == "nm_sparse" else round(0.2 * total))
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["momentum", "adamw_amsgrad", "adafactor", "rprop", "lbfgs"])
def test_resume_is_exact(name: str, policy: str) -> None:
    stop = 1 + (len(name) + len(policy)) % (STEPS - 2)
    whole_model, whole = wrap(name, policy)
    losses = train(whole_model, whole, 0, STEPS)

    first_model, first = wrap(name, policy)
    early = train(first_model, first, 0, stop)
    file = io.BytesIO()
    torch.save({"model": first_model.state_dict(), "optimizer": first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    keys = set(saved["optimizer"])

    model, optimizer = wrap(name, policy, seed=7)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert set(saved["optimizer"]) == keys, "the caller's dict was changed"
    assert early + train(model, optimizer, stop, STEPS) == losses
    assert same(weights(model), weights(whole_model))
    assert optimizer.step_count == whole.step_count
    masks = whole.masks()
    assert all(torch.equal(mask, masks[n]) for n, mask in optimizer.masks().items())


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
    clean_model, clean = wrap(name, policy)
    dirty_model, dirty = wrap(name, policy)
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        backward(clean_model, step)
        clean.step()
        backward(dirty_model, step)
        growing = policy == "rigl" and POLICIES[policy].update_is_due(step)
        for target in dirty.targets.values():
            where = ~target.mask & (torch.rand(target.shape, generator=generator) < 0.5)
            if not growing:
                target.param.grad[where] = float("nan") if step % 2 else float("inf")
        dirty.step()
    assert same(weights(clean_model), weights(dirty_model))


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
    model, optimizer = wrap("momentum", policy)
    keys = list(weights(wrap("sgd", "static")[0]))
    train(model, optimizer, 0, STEPS)
    x, _ = batch_of_one()
    model.eval()
    expected, masks = model(x), optimizer.masks()
    optimizer.finalize()
    assert torch.equal(model(x), expected)
    assert list(model.state_dict()) == keys
    assert not any("sparsetrain" in type(m).__module__ for m in model.modules())
    for name, mask in masks.items():
        assert (dict(model.named_parameters())[name].detach()[~mask] == 0).all()
    assert not optimizer.base._optimizer_step_post_hooks
    with pytest.raises(RuntimeError, match="finalized"):
        optimizer.step()
    optimizer.base.step()  # the plain optimizer goes on


def batch_of_one() -> tuple[Tensor, Tensor]:
    return torch.ones(1, 4, 4, 4), torch.zeros(1, dtype=torch.long)


@settings(max_examples=25)
@given(
    sparsity=some.floats(0, 0.97),
    policy=some.sampled_from(["static", "set", "rigl", "snfs", "gradual"]),
    allocation=some.sampled_from(
        ["uniform", "erdos_renyi", "erdos_renyi_kernel", "uniform_first_dense", "global"]
    ),
    seed=some.integers(0, 1000),
)
def test_counts_are_exact_for_any_sparsity_and_allocation(
    sparsity: float, policy: str, allocation: str, seed: int
) -> None:
    data = POLICIES[policy].model_dump() | {"sparsity": sparsity, "allocation": allocation}
    model, optimizer = wrap("momentum", type(POLICIES[policy]).model_validate(data), seed)
    train(model, optimizer, 0, STEPS)
    targets = list(optimizer.targets.values())
    first = targets[0].numel if allocation == "uniform_first_dense" else 0
    shared = sum(t.numel for t in targets) - first
    assert sum(t.active for t in targets) == round((1 - sparsity) * shared) + first
    assert all(t.active >= 1 for t in targets)
