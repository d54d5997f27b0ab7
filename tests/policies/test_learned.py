"""What every policy with learned masks keeps to."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from learned_runs import ALL, NATIVE, STEERED, STEPS, answers, train, wrap
from runs import SmallNet, batch, same, weights
from torch.nn import functional as F
from torch.nn.utils import parametrize

import sparsetrain as st
from sparsetrain.storage.learned import LearnedTarget


def learned(optimizer: st.SparseOptimizer) -> list[LearnedTarget]:
    found = list(optimizer.targets.values())
    assert all(isinstance(target, LearnedTarget) for target in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=5, deadline=None)
@given(seed=some.integers(0, 100), steps=some.integers(0, STEPS))
def test_finalize_changes_no_output(name: str, seed: int, steps: int) -> None:
    model, optimizer = wrap(ALL[name], seed)
    plain = SmallNet(seed)
    train(model, optimizer, 0, steps)
    before, masks, sparsity = answers(model), optimizer.masks(), optimizer.sparsity()
    optimizer.finalize()
    torch.testing.assert_close(answers(model), before, rtol=0, atol=1e-6)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert len(optimizer.base.param_groups) == 1
    assert {id(p) for p in optimizer.base.state} <= {id(p) for p in model.parameters()}
    for key, mask in masks.items():
        assert (model.get_parameter(key).detach()[~mask] == 0).all()
        assert torch.equal(optimizer.masks()[key], mask)
    assert optimizer.sparsity() == sparsity


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("name", STEERED)
def test_the_sparsity_asked_for_is_reached(name: str, optimizer: str, exact: bool) -> None:
    policy = type(STEERED[name]).model_validate({**STEERED[name].model_dump(), "exact": exact})
    if name.startswith("variational") and optimizer == "sgd":
        pytest.skip("its regulariser has gradients of 1/w; the paper trains with Adam")
    model, wrapped = wrap(policy, optimizer=optimizer)
    train(model, wrapped, 0, STEPS)
    total = sum(target.numel for target in wrapped.targets.values())
    wanted = round(0.3 * total)
    active = sum(target.active for target in wrapped.targets.values())
    sizes = [target.learned.sharing.size for target in learned(wrapped)]
    gate = max(sizes) if name == "hard_concrete_inputs" else 1
    assert abs(active - wanted) <= max((0 if exact else 0.0025) * total, gate - 1)
    assert all(target.active for target in wrapped.targets.values())
    wrapped.finalize()
    assert sum(int((p != 0).sum()) for p in map(model.get_parameter, wrapped.targets)) <= active


@pytest.mark.parametrize("name", ALL)
def test_a_resumed_run_is_the_same(name: str) -> None:
    model, optimizer = wrap(ALL[name])
    train(model, optimizer, 0, 25)
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    kept = answers(model)
    model.train()
    train(model, optimizer, 25, STEPS)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    again, resumed = wrap(ALL[name], seed=3)
    resumed.load_state_dict(saved["optimizer"])
    again.load_state_dict(saved["model"])
    assert torch.equal(answers(again), kept)
    again.train()
    train(again, resumed, 25, STEPS)
    assert same(weights(model), weights(again))
    assert torch.equal(answers(model), answers(again))
    assert resumed.summary() == optimizer.summary()


@pytest.mark.parametrize("name", ALL)
def test_copies_go_their_own_way(name: str) -> None:
    model, optimizer = wrap(ALL[name])
    train(model, optimizer, 0, 10)
    twin, other = copy.deepcopy((model, optimizer))
    train(twin, other, 10, 20)
    train(model, optimizer, 10, 20)
    assert same(weights(model), weights(twin))
    train(twin, other, 20, 21)
    assert not same(weights(model), weights(twin))


# torch's own tracing does what it warns of.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", ALL)
def test_compiled_models_answer_the_same(name: str) -> None:
    model, optimizer = wrap(ALL[name])
    compiled = torch.compile(model, backend="eager")
    train(compiled, optimizer, 0, 4)
    expected = answers(model)
    torch.testing.assert_close(answers(compiled), expected)


@pytest.mark.parametrize("name", ALL)
def test_autocast(name: str) -> None:
    model, optimizer = wrap(ALL[name])
    for step in range(4):
        x, y = batch(step)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    assert torch.isfinite(answers(model)).all()
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("name", [n for n in NATIVE if n not in ("soft_threshold", "two_of_four")])
def test_the_regulariser_is_added_inside_the_step(name: str) -> None:
    """Plain SGD, one step: the weights move by the loss's gradient plus that of the penalty."""
    policy = NATIVE[name].model_copy(update={"warm_up": 0.0})
    model = SmallNet(0).double()
    optimizer = st.SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.5), model, policy)
    x, y = batch(0)
    torch.manual_seed(0)
    F.cross_entropy(model(x.double()), y).backward()
    of_loss = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    strength = policy.strength
    assert strength is not None
    penalty = sum(t.learned.penalty(t.param) for t in learned(optimizer)) * strength
    torch.testing.assert_close(optimizer.penalty(), penalty.detach())
    names, params = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(penalty, params, allow_unused=True)
    of_penalty = dict(zip(names, found, strict=True))
    optimizer.step()
    for key, value in model.named_parameters():
        if ".0." in key and policy.moves_in_log_odds:
            continue  # gates: their gradients are brought to a common size first
        extra = of_penalty[key]
        gradient = of_loss.get(key, 0.0) + (0.0 if extra is None else extra)
        torch.testing.assert_close(value.detach(), before[key] - 0.5 * gradient)


def test_gates_are_a_group_of_their_own() -> None:
    model = SmallNet()
    base = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, betas=(0.8, 0.9))
    policy = st.HardConcrete(sparsity=0.5, total_steps=1000)
    st.SparseOptimizer(base, model, policy)
    _, gates = base.param_groups
    assert len(gates["params"]) == 3
    assert gates["weight_decay"] == 0.0 and gates["betas"] == (0.8, 0.9)
    assert gates["lr"] == pytest.approx(0.3)
    decayed = st.SoftThreshold(strength=0.3)
    other = SmallNet()
    base = torch.optim.AdamW(other.parameters(), lr=0.01, weight_decay=0.1)
    st.SparseOptimizer(base, other, decayed)
    assert base.param_groups[1]["weight_decay"] == 0.3 and base.param_groups[1]["lr"] == 0.01


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_gates_take_steps_of_one_size_under_any_optimizer(optimizer: str) -> None:
    """SGD's gradients of gates are divided by their own size; Adam does so itself."""
    model, wrapped = wrap(STEERED["hard_concrete"], optimizer=optimizer)
    gate = model.hidden.parametrizations.weight[0].log_alpha
    before = gate.detach().clone()
    train(model, wrapped, 0, 1)
    moved = (gate.detach() - before).abs()
    lr = wrapped.param_groups[1]["lr"]
    assert (moved > 0.9 * lr).float().mean() > 0.9
    assert moved.max() < 1.01 * lr
    assert (gate.grad.abs().max() == 1.0) == (optimizer == "sgd")


def test_mixed_recipes() -> None:
    model = SmallNet()
    recipe = st.Recipe.from_dict(
        {
            "policy": {
                "kind": "rigl",
                "sparsity": 0.6,
                "total_steps": STEPS,
                "update": {"every": 4},
            },
            "rules": [
                {"match": "hidden.*", "policy": {"kind": "hard_concrete", "strength": 1e-3}},
                {
                    "match": "head.*",
                    "policy": {"kind": "movement", "sparsity": 0.5, "total_steps": STEPS},
                },
            ],
        }
    )
    optimizer = st.SparseOptimizer(torch.optim.AdamW(model.parameters(), lr=0.01), model, recipe)
    train(model, optimizer, 0, STEPS)
    rows = {row.name: row for row in optimizer.summary().rows}
    assert {name: row.policy for name, row in rows.items()} == {
        "conv.weight": "rigl",
        "hidden.weight": "hard_concrete",
        "head.weight": "movement",
    }
    assert rows["conv.weight"].density == pytest.approx(0.4, abs=0.01)
    assert rows["head.weight"].density == pytest.approx(0.5, abs=0.02)
    before = answers(model)
    optimizer.finalize()
    torch.testing.assert_close(answers(model), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("exact", [False, True])
def test_a_count_that_is_off_by_one_is_put_right_at_the_last_step_alone(exact: bool) -> None:
    policy = st.HardConcrete(sparsity=0.7, total_steps=STEPS, exact=exact)
    _, optimizer = wrap(policy)
    [budget] = policy.budgets(optimizer._keeper.groups[0][1])
    assert budget.tolerance > 1
    for surplus in (-1, 1):
        assert not policy._moves_due(budget, surplus, STEPS - 2)
        assert bool(policy._moves_due(budget, surplus, STEPS - 1)) == exact


def test_each_layer_gets_its_share() -> None:
    shares = {"conv.*": 0.5, "hidden.*": 0.1, "head.*": 0.8}
    allocation = {"kind": "explicit", "densities": shares}
    policy = st.HardConcrete(
        allocation=allocation, total_steps=STEPS, exact=True, update={"every": 2}
    )
    model, optimizer = wrap(policy)
    train(model, optimizer, 0, STEPS)
    for (name, target), share in zip(optimizer.targets.items(), shares.values(), strict=True):
        assert target.active == round(share * target.numel), name
    assert optimizer.summary().rows[1].target_density == pytest.approx(0.1, abs=0.01)
