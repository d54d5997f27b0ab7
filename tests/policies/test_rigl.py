"""RigL against Algorithm 1 of Evci et al. 2020, done by hand with full sorts."""

from __future__ import annotations

import math

import pytest
import torch
from runs import STEPS, shaped_state, train, wrap
from torch import nn
from twins import Twin, agree, ranks, without_smallest

import sparsetrain as st

EVERY, ALPHA = 3, 0.3


def rigl_by_hand(twin: Twin) -> None:
    stop = round(0.75 * STEPS)
    share = ALPHA / 2 * (1 + math.cos(math.pi * twin.step / stop))
    for name, mask in twin.masks.items():
        active = int(mask.sum())
        count = int(active * share)
        kept = without_smallest(twin.weight(name), mask, count)
        growth = twin.gradients[name].abs().masked_fill(kept, -1.0)
        twin.install(name, kept | (ranks(growth) < count))


def test_training_equals_algorithm_1() -> None:
    policy = st.RigL(sparsity=0.8, total_steps=STEPS, update={"every": EVERY})
    model, optimizer = wrap("momentum", policy)
    twin = Twin.of(optimizer)
    first = optimizer.masks()
    train(model, optimizer, 0, STEPS)
    stop = round(0.75 * STEPS)
    twin.train(STEPS, rigl_by_hand, at=lambda t: t % EVERY == 0 and t < stop, instead=True)
    agree(model, optimizer, twin)
    assert any((mask != first[name]).any() for name, mask in optimizer.masks().items())


def one_row(
    weight: list[float], gradient: list[float], momentum: list[float], share: float
) -> tuple[nn.Linear, st.SparseOptimizer]:
    """A single row with given weights (0 is inactive), gradients and momenta, updated once."""
    model = nn.Linear(len(weight), 1, bias=False)
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    active = sum(w != 0 for w in weight)
    policy = st.RigL(
        sparsity=1 - active / len(weight),
        total_steps=10,
        drop_fraction=st.Schedule(shape="constant", initial=share, final=share),
    )
    optimizer = st.SparseOptimizer(base, model, policy)
    values = torch.tensor([weight])
    optimizer.targets["weight"].replace_mask(values != 0)
    with torch.no_grad():
        model.weight.copy_(values)
    base.state[model.weight]["momentum_buffer"] = torch.tensor([momentum])
    model.weight.grad = torch.tensor([gradient])
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize(
    "gradient, expected",
    [
        ([0, 0, 0, 0, 7, 1], [5.0, -4, 0, 0, 0, 0]),  # the two smallest go, two places grow
        ([9, 9, 9, 0, 7, 1], [5.0, -4, 3, 0, 0, 0]),  # 3 is dropped and regrows with its value
        ([0, 0, 3, 2, 0, 0], [5.0, -4, 3, 2, 0, 0]),  # both come back: nothing changes
    ],
)
def test_hand_made_rows(gradient: list[float], expected: list[float]) -> None:
    weight = [5.0, -4, 3, 2, 0, 0]
    momentum = [1.0, 2, 3, 4, 0, 0]
    model, optimizer = one_row(weight, [float(g) for g in gradient], momentum, 0.5)
    assert model.weight.detach().tolist() == [expected]
    assert optimizer.targets["weight"].active == 4
    # Kept and regrown connections keep their momentum, new ones start without.
    state = shaped_state(optimizer.base, model.weight)["momentum_buffer"]
    assert state.tolist() == [[m if w else 0.0 for m, w in zip(momentum, expected, strict=True)]]


def test_equal_gradients_grow_at_the_lower_index() -> None:
    _, optimizer = one_row([3.0, 0, 0, 0, 2, 1], [0.0, 5, 5, 5, 0, 0], [0.0] * 6, 0.5)
    assert optimizer.masks()["weight"].tolist() == [[True, True, False, False, True, False]]


@pytest.mark.parametrize("structure", [{"kind": "block", "size": [2, 2]}, "constant_fan_in"])
def test_structured_rows_and_blocks_keep_their_shape(structure: object) -> None:
    model = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))
    optimizer = st.SparseOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        model,
        st.RigL(
            sparsity=0.5,
            total_steps=12,
            drop_fraction=0.5,
            structure=structure,
            allocation="uniform",
            update={"every": 2},
        ),
    )
    masks = [optimizer.masks()]
    for step in range(12):
        optimizer.zero_grad()
        x = torch.randn(16, 16, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        masks.append(optimizer.masks())
        for name, mask in masks[-1].items():
            assert int(mask.sum()) == int(masks[0][name].sum())
            if structure == "constant_fan_in":
                assert mask.sum(1).unique().numel() == 1
            else:
                blocks = mask.unflatten(1, (-1, 2)).unflatten(0, (-1, 2)).sum((1, 3))
                assert set(blocks.unique().tolist()) <= {0, 4}
    assert any((masks[0][name] != masks[-1][name]).any() for name in masks[0])
