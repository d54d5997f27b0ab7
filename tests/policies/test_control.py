"""Steering: which gates are put across, how the multiplier moves, where thresholds lie."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from learned_runs import STEPS, train, wrap
from torch import Tensor
from torch.nn import Parameter

import sparsetrain as st
from sparsetrain.learned.gumbel_softmax import GumbelSoftmaxMask
from sparsetrain.learned.sharing import Sharing, share
from sparsetrain.part import Part
from sparsetrain.policies.control import Budget, Steering, nearest_gates, next_strength
from sparsetrain.policies.soft_threshold import _between
from sparsetrain.storage.learned import LearnedTarget

logits = some.lists(some.sampled_from([-3.0, -2.0, -0.5, 0.0, 0.5, 1.0, 4.0]), min_size=3)


def target(name: str, values: list[float], size: int) -> LearnedTarget:
    """A weight of [gates, size] whose rows share a gate with these logits."""
    sharing = Sharing((len(values), size), (len(values), size), (len(values), 1))
    mask = GumbelSoftmaxMask(sharing, torch.tensor(values)[:, None])
    return LearnedTarget(name, Parameter(torch.ones(len(values), size)), [], mask)


@settings(max_examples=60)
@given(layers=some.lists(logits, min_size=1, max_size=3), surplus=some.integers(-12, 12))
def test_the_nearest_gates_go_and_no_layer_loses_its_best(
    layers: list[list[float]], surplus: int
) -> None:
    sizes = [1, 2, 1]
    names = ["a", "b", "c"]
    targets = [
        target(name, values, size) for name, values, size in zip(names, layers, sizes, strict=False)
    ]
    chosen = nearest_gates(targets, surplus)
    may_go: list[tuple[float, int, str, int]] = []
    for number, (name, values) in enumerate(zip(names, layers, strict=False)):
        best = max(range(len(values)), key=lambda i: values[i])
        for i, value in enumerate(values):
            if (value > 0) == (surplus > 0) and not (surplus > 0 and i == best):
                may_go.append((abs(value), number, name, i))
    may_go.sort(key=lambda gate: gate[:2])
    taken: set[tuple[str, int]] = set()
    room = abs(surplus)
    for _, number, name, i in may_go:
        room -= sizes[number]
        if room >= 0:
            taken.add((name, i))
    found = {(name, int(i)) for name, indices in chosen.items() for i in indices}
    assert found == taken


def test_the_multiplier_grows_while_too_many_are_kept() -> None:
    memory: dict[str, Any] = {"all.integral": math.log(1e-6), "all.strength": 1e-6}
    steering = Steering(gain=10.0, damping=2.0)
    strengths = []
    for _ in range(5):
        next_strength(steering, memory, "all", 0.5, updates=100, corrected=False)
        strengths.append(memory["all.strength"])
    ratios = [b / a for a, b in itertools.pairwise(strengths)]
    assert ratios == pytest.approx([math.exp(0.05)] * 4)
    assert strengths[0] == pytest.approx(1e-6 * math.exp(0.05 + 1.0))
    next_strength(steering, memory, "all", -0.5, updates=100, corrected=False)
    assert memory["all.strength"] < 1e-6
    next_strength(steering, memory, "all", 0.0, updates=100, corrected=True)
    assert memory["all.strength"] == pytest.approx(math.exp(memory["all.integral"]))


def test_a_gate_put_across_leaves_no_error_behind() -> None:
    memory: dict[str, Any] = {"all.integral": 0.0, "all.strength": 1.0}
    next_strength(Steering(damping=30.0), memory, "all", -3.0, updates=1000, corrected=True)
    assert memory["all.strength"] > 0.9


@given(
    levels=some.lists(some.floats(-5, 5, width=32), min_size=2, max_size=30, unique=True),
    below=some.integers(1, 29),
)
def test_the_level_has_so_many_below_it(levels: list[float], below: int) -> None:
    below = min(below, len(levels))
    level = _between(torch.tensor(levels), below, Part(()))
    values = torch.tensor(levels, dtype=torch.float64)
    assert int((values <= level).sum()) == below


def test_weights_of_0_and_above_1_have_levels_at_the_ends() -> None:
    levels = torch.tensor([-math.inf, -math.inf, -1.0, 2.0, math.inf])
    assert _between(levels, 2, Part(())) < -1.0
    assert -1.0 < _between(levels, 3, Part(())) < 2.0
    assert 2.0 <= _between(levels, 4, Part(())) < math.inf


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.97])
def test_budgets_and_their_curve(sparsity: float) -> None:
    _, optimizer = wrap(st.HardConcrete(sparsity=sparsity, total_steps=100))
    policy, group = optimizer._keeper.groups[0]
    assert isinstance(policy, st.HardConcrete)
    (budget,) = policy.budgets(group)
    assert budget.keep == round((1 - sparsity) * budget.numel)
    curve = [policy.wanted(budget, step) for step in range(100)]
    assert curve == sorted(curve, reverse=True)
    assert curve[74] == curve[99] == budget.keep
    assert curve[0] == pytest.approx(budget.rising(1 - (1 - 1 / 75) ** 3))
    assert budget.tolerance <= 0.05 * budget.keep


def test_variational_dropout_drops_early() -> None:
    policy = st.VariationalDropout(sparsity=0.96, total_steps=100)
    budget = Budget("all", [target("a", [1.0] * 1000, 1)], 40)
    curve = [policy.wanted(budget, step) for step in range(100)]
    assert curve == sorted(curve, reverse=True)
    assert curve[10] < 0.15 * 1000 and curve[74] == pytest.approx(40)


def test_a_layer_never_loses_everything() -> None:
    """A strength that is far too large leaves each layer its best gate."""
    for policy in (
        st.HardConcrete(strength=10.0, update={"every": 1}, mask_lr=0.5),
        st.GumbelSoftmax(strength=10.0, update={"every": 1}, mask_lr=0.5),
        st.VariationalDropout(strength=10.0, warm_up=0.0, update={"every": 1}, mask_lr=0.5),
        st.Movement(mode="threshold", strength=10.0, update={"every": 1}, mask_lr=0.5),
    ):
        model, optimizer = wrap(policy)
        train(model, optimizer, 0, STEPS)
        assert optimizer.sparsity() > 0.5
        assert all(t.active for t in optimizer.targets.values()), policy.kind


def test_units_are_gated_as_a_whole() -> None:
    for per, dimension in (("input", 1), ("output", 0)):
        model, optimizer = wrap(
            st.HardConcrete(sparsity=0.5, per=per, total_steps=STEPS, update={"every": 2})
        )
        train(model, optimizer, 0, STEPS)
        for mask in optimizer.masks().values():
            units = mask.transpose(0, dimension).flatten(1)
            assert ((units.sum(1) == 0) | (units.sum(1) == units.shape[1])).all()


def test_what_steering_remembers_is_plain() -> None:
    model, optimizer = wrap(st.HardConcrete(sparsity=0.5, total_steps=STEPS))
    train(model, optimizer, 0, 15)
    memory = optimizer.state_dict()["sparsetrain"]["memories"][0]
    assert {"all.strength", "all.integral"} <= memory.keys()
    assert all(isinstance(value, float | bool | Tensor) for value in memory.values())
    layered, other = wrap(
        st.HardConcrete(sparsity=0.5, allocation="erk", total_steps=STEPS), optimizer="sgd"
    )
    train(layered, other, 0, 15)
    memory = other.state_dict()["sparsetrain"]["memories"][0]
    assert sum(memory["keep"].values()) == round(0.5 * sum(t.numel for t in other.targets.values()))
    assert {f"{name}.strength" for name in other.targets} <= memory.keys()


def test_the_first_multiplier_is_found_when_the_schedule_starts() -> None:
    policy = st.HardConcrete(sparsity=0.5, total_steps=STEPS, update={"start": 6, "every": 2})
    model, optimizer = wrap(policy)
    memory = optimizer._keeper.groups[0][1].memory
    train(model, optimizer, 0, 6)
    assert "all.strength" not in memory
    assert float(optimizer.penalty()) == 0
    train(model, optimizer, 6, 7)
    assert memory["all.strength"] > 0


def test_a_strength_of_ones_own_waits_for_the_start() -> None:
    policy = st.HardConcrete(strength=0.1, update={"start": 3, "every": 2})
    model, optimizer = wrap(policy)
    for step in range(5):
        assert (float(optimizer.penalty()) > 0) == (step >= 3)
        train(model, optimizer, step, step + 1)


@pytest.mark.parametrize(
    ("update", "message"),
    [({"start": 20}, "stop before step 8"), ({"stop": 50}, "lies beyond total_steps=10")],
)
def test_a_schedule_has_to_fit_the_run(update: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        st.HardConcrete(sparsity=0.5, total_steps=10, update=update)


def test_gradients_of_gates_are_divided_by_a_running_mean() -> None:
    policy = st.HardConcrete(sparsity=0.5, total_steps=STEPS)
    _, optimizer = wrap(policy, optimizer="sgd")
    group = optimizer._keeper.groups[0][1]
    held = group.held_as(LearnedTarget)[0]
    (gate,) = held.learned.gates()
    for size, expected in ((4.0, 1.0), (0.4, 0.4 / math.sqrt(0.99 * 16 + 0.01 * 0.16))):
        gate.grad = torch.full_like(gate, size)
        policy._normalise(group, held)
        torch.testing.assert_close(gate.grad, torch.full_like(gate, expected))


def test_finalizing_makes_exact_what_further_training_has_changed() -> None:
    policy = st.HardConcrete(sparsity=0.7, total_steps=STEPS, exact=True)
    model, optimizer = wrap(policy)
    train(model, optimizer, 0, STEPS)
    with torch.no_grad():
        for held in optimizer._keeper.groups[0][1].held_as(LearnedTarget):
            for gate in held.learned.gates():
                gate.copy_(torch.randn_like(gate))
    optimizer.finalize()
    weights = [model.get_parameter(name) for name in optimizer.targets]
    kept = sum(int((weight != 0).sum()) for weight in weights)
    assert kept == round(0.3 * sum(weight.numel() for weight in weights))


def test_gates_move_as_fast_with_momentum_as_without() -> None:
    policy = st.HardConcrete(sparsity=0.5, total_steps=10_000)
    plain = policy.group_options({"lr": 0.1})
    assert plain == {"lr": 0.03}
    options = policy.group_options({"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1})
    assert options == {"lr": pytest.approx(0.003), "weight_decay": 0.0}
    chosen = st.HardConcrete(sparsity=0.5, total_steps=10_000, mask_lr=0.2)
    assert chosen.group_options({"momentum": 0.9}) == {"lr": 0.2}


def test_sharing_by_layer_shape() -> None:
    assert share("output", (3, 4, 2)).size == 8
