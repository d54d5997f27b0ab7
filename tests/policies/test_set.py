"""SET against its definition: what is dropped, where new connections land, what they hold."""

from __future__ import annotations

import pytest
import torch
from runs import STEPS, backward, train, wrap
from torch import Tensor, nn
from twins import Twin, agree, without_smallest

import sparsetrain as st


def test_training_with_the_growth_taken_over_equals_the_plain_loop() -> None:
    """Growth is random; the twin copies it and checks that it is where it may be."""
    policy = st.SET(sparsity=0.8, total_steps=STEPS, update={"every": 3})
    model, optimizer = wrap("momentum", policy)
    twin = Twin.of(optimizer)
    after: list[dict[str, Tensor]] = []
    optimizer.register_update_hook(lambda event: after.append(optimizer.masks()))
    train(model, optimizer, 0, STEPS)
    updates = iter(after)

    def set_by_hand(twin: Twin) -> None:
        drawn = next(updates)
        for name, mask in twin.masks.items():
            active = int(mask.sum())
            survivors = without_smallest(twin.weight(name), mask, int(0.3 * active))
            assert drawn[name][survivors].all(), "a survivor was dropped"
            assert int(drawn[name].sum()) == active
            twin.install(name, drawn[name])

    twin.train(STEPS, set_by_hand, at=lambda step: step % 3 == 0)
    agree(model, optimizer, twin)
    assert next(updates, None) is None


def test_growth_is_uniform_over_the_places_that_are_not_kept() -> None:
    model = nn.Linear(30, 1, bias=False)
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    policy = st.SET(sparsity=0.8, total_steps=4000, update={"every": 1}, drop_fraction=0.5)
    optimizer = st.SparseOptimizer(base, model, policy, seed=1)
    target = optimizer.targets["weight"]
    kept = torch.arange(30) < 3
    grown = torch.zeros(30)
    for _ in range(3000):
        target.replace_mask((torch.arange(30) < 6).view(1, 30))
        with torch.no_grad():
            model.weight[0, :6] = torch.tensor([3.0, 3.0, 3.0, 1.0, 1.0, 1.0])
        optimizer.update_masks()
        grown += target.mask[0] & ~kept
    assert (target.mask[0][kept]).all()
    expected = 3000 * 3 / 27
    deviation = (grown[~kept] - expected) / expected**0.5
    assert grown[kept].sum() == 0
    assert deviation.abs().max() < 4.5


def test_the_papers_own_rule_drops_each_sign_by_itself() -> None:
    values = torch.tensor([[0.1, 0.2, 0.3, 5.0, -1.0, -2.0, -3.0, -4.0, 0.0, 0.0, 0.0, 0.0]])
    model = nn.Linear(12, 1, bias=False)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    policy = st.SET(
        sparsity=1 / 3, total_steps=10, drop_fraction=0.5, drop="magnitude_by_sign", grow_std=2.0
    )
    optimizer = st.SparseOptimizer(base, model, policy)
    optimizer.targets["weight"].replace_mask(values != 0)
    with torch.no_grad():
        model.weight.copy_(values)
    optimizer.update_masks()
    mask, weight = optimizer.masks()["weight"][0], model.weight.detach()[0]
    assert int(mask.sum()) == 8
    assert weight[[2, 3, 6, 7]].tolist() == pytest.approx([0.3, 5.0, -3.0, -4.0])
    regrown = (weight[[0, 1, 4, 5]] == values[0, [0, 1, 4, 5]]) & mask[[0, 1, 4, 5]]
    assert (mask[[0, 1, 4, 5]] == regrown).all(), "a regrown connection keeps its value"
    assert (weight[8:][mask[8:]] != 0).all(), "new weights are drawn from a normal"
    assert (weight[~mask] == 0).all()


def test_the_gradient_step_comes_before_the_update() -> None:
    model, optimizer = wrap("sgd", st.SET(sparsity=0.8, total_steps=STEPS, update={"every": 3}))
    mask = optimizer.masks()["hidden.weight"]
    before = model.hidden.weight.detach().clone()
    backward(model, 0)
    gradient = model.hidden.weight.grad.clone()
    optimizer.step()
    stayed = mask & optimizer.masks()["hidden.weight"]
    moved = before - 0.1 * gradient
    torch.testing.assert_close(model.hidden.weight.detach()[stayed], moved[stayed])
