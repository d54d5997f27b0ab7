"""Gradual pruning against Zhu & Gupta 2017, equation 1, and a plain loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from runs import STEPS, SmallNet, train, wrap
from twins import Twin, agree, without_smallest

import sparsetrain as st
from sparsetrain.allocation import LayerShape, allocate


def gradual_by_hand(twin: Twin, sparsity: float, first: int, last: int) -> None:
    wanted = sparsity - sparsity * (1 - (twin.step - first) / (last - first)) ** 3
    layers = [LayerShape(name, tuple(mask.shape)) for name, mask in twin.masks.items()]
    counts = allocate("erdos_renyi_kernel", layers, wanted)
    for name, mask in twin.masks.items():
        excess = int(mask.sum()) - counts[name]
        twin.install(name, without_smallest(twin.weight(name), mask, excess))


def test_training_equals_the_plain_loop() -> None:
    policy = st.Gradual(sparsity=0.8, total_steps=STEPS, update={"every": 2, "start": 2})
    model, optimizer = wrap("momentum", policy)
    twin = Twin.of(optimizer)
    assert optimizer.sparsity() == 0
    train(model, optimizer, 0, STEPS)
    stop = round(0.75 * STEPS)
    due = [step for step in range(2, stop) if step % 2 == 0]
    twin.train(
        STEPS,
        lambda twin: gradual_by_hand(twin, 0.8, due[0], due[-1]),
        at=due.__contains__,
    )
    agree(model, optimizer, twin)
    assert optimizer.sparsity() == pytest.approx(0.8, abs=1e-3)


@given(
    initial=some.floats(0, 0.5),
    final=some.floats(0.5, 0.99),
    every=some.integers(1, 40),
    start=some.integers(0, 200),
)
def test_the_cubic_curve_and_its_ends(initial: float, final: float, every: int, start: int) -> None:
    policy = st.Gradual(
        sparsity=final,
        initial_sparsity=initial,
        total_steps=400,
        update={"every": every, "start": start},
    )
    updates = [step for step in range(400) if policy.update_is_due(step)]
    assert policy.last_update() == updates[-1]
    values = [policy.sparsity_at(step) for step in updates]
    assert values[-1] == final
    assert values == sorted(values)
    for step, value in zip(updates[:-1], values[:-1], strict=True):
        share = (step - start) / (updates[-1] - start)
        assert value == pytest.approx(final + (initial - final) * (1 - share) ** 3)


@settings(max_examples=20)
@given(
    allocation=some.sampled_from(["uniform", "erdos_renyi_kernel", "global"]),
    score=some.sampled_from(["magnitude", "random", "taylor", "gradient"]),
    shape=some.sampled_from(["cubic", "linear", "cosine"]),
)
def test_pruned_weights_stay_pruned(allocation: str, score: str, shape: str) -> None:
    policy = st.Gradual(
        sparsity=0.9,
        total_steps=STEPS,
        allocation=allocation,
        score=score,
        shape=shape,
        update={"every": 2},
    )
    model, optimizer = wrap("momentum", policy)
    masks = optimizer.masks()
    for step in range(STEPS):
        train(model, optimizer, step, step + 1)
        for name, mask in optimizer.masks().items():
            assert not (mask & ~masks[name]).any()
            masks[name] = mask
    assert optimizer.sparsity() == pytest.approx(0.9, abs=1e-3)


def test_global_allocation_ranks_all_layers_together() -> None:
    policy = st.Gradual(
        sparsity=0.7, total_steps=4, allocation="global", update={"every": 1, "stop": 1}
    )
    model = SmallNet()
    optimizer = st.SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), model, policy)
    everything = torch.cat([t.param.detach().view(-1).abs() for t in optimizer.targets.values()])
    train(model, optimizer, 0, 1)
    count = round(0.3 * everything.numel())
    threshold = everything.sort(descending=True).values[count - 1]
    for target in optimizer.targets.values():
        assert ((target.param.detach() != 0) == target.mask).all()
        assert (target.param.detach().abs()[target.mask] >= threshold).all()
    assert sum(t.active for t in optimizer.targets.values()) == count


def test_blocks_go_as_a_whole() -> None:
    policy = st.Gradual(
        sparsity=0.5,
        total_steps=6,
        structure={"kind": "block", "size": [1, 4]},
        update={"every": 1, "stop": 1.0},
    )
    model, optimizer = wrap("momentum", policy)
    train(model, optimizer, 0, 6)
    for mask in optimizer.masks().values():
        blocks = mask.flatten(1).unflatten(1, (-1, 4)).sum(2)
        assert set(blocks.unique().tolist()) <= {0, 4}
    assert optimizer.sparsity() == pytest.approx(0.5, abs=0.01)


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="initial_sparsity"):
        st.Gradual(sparsity=0.5, initial_sparsity=0.6, total_steps=10)
    for update in ({"start": 75}, {"start": 50, "stop": 50}):
        with pytest.raises(ValueError, match="ever"):
            st.Gradual(sparsity=0.5, total_steps=100, update=update)
    with pytest.raises(ValueError, match="n:m"):
        st.Gradual(sparsity=0.5, total_steps=10, structure="2:4")
    with pytest.raises(ValueError, match="erdos_renyi"):
        st.Gradual(total_steps=10, allocation={"kind": "erdos_renyi", "epsilon": 5})
