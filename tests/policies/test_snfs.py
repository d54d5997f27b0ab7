"""SNFS against Algorithm 2 of Dettmers & Zettlemoyer 2019, done by hand."""

from __future__ import annotations

import math

import pytest
import torch
from runs import STEPS, backward, train, wrap
from torch import Tensor, nn
from twins import Twin, agree, ranks, without_smallest

import sparsetrain as st


def test_training_equals_the_plain_loop() -> None:
    policy = st.SNFS(sparsity=0.8, total_steps=STEPS, update={"every": 3}, drop_fraction=0.5)
    model, optimizer = wrap("momentum", policy)
    twin = Twin.of(optimizer)
    counts = {name: int(mask.sum()) for name, mask in twin.masks.items()}
    train(model, optimizer, 0, STEPS)
    momenta: dict[str, Tensor] = {}
    stop = round(0.75 * STEPS)

    def follow(step: int) -> bool:
        """Called once a step, before anything changes: the running mean of dense gradients."""
        for name, gradient in twin.gradients.items():
            before = momenta.get(name, torch.zeros_like(gradient))
            momenta[name] = torch.lerp(before, gradient, 1 - 0.9)
        return step % 3 == 0 and step < stop

    def snfs_by_hand(twin: Twin) -> None:
        share = 0.25 * (1 + math.cos(math.pi * twin.step / stop))
        means = {
            name: float(momenta[name].abs()[mask].double().mean())
            for name, mask in twin.masks.items()
        }
        kept, freed = {}, 0
        for name, mask in twin.masks.items():
            active, zeros = int(mask.sum()), 1 - float(mask.double().mean())
            spared = zeros < 0.2 and means[name] > sum(means.values()) / len(means)
            count = math.ceil((min(share, zeros) if spared else share) * active)
            kept[name] = without_smallest(twin.weight(name), mask, count)
            freed += count
        growth = by_mean_momentum(means, kept, freed)
        for name, mask in kept.items():
            wish = momenta[name].abs().masked_fill(mask, -1.0)
            twin.install(name, mask | (ranks(wish) < growth[name]))

    twin.train(STEPS, snfs_by_hand, at=follow)
    agree(model, optimizer, twin)
    assert counts != {name: int(mask.sum()) for name, mask in twin.masks.items()}


def by_mean_momentum(
    means: dict[str, float], kept: dict[str, Tensor], freed: int
) -> dict[str, int]:
    """Shares by mean |momentum|; full layers hand on what they cannot take."""
    room = {name: int((~mask).sum()) for name, mask in kept.items()}
    ideal = dict.fromkeys(kept, 0.0)
    open_layers, rest = [name for name in kept if room[name]], float(freed)
    while True:
        total = sum(means[name] for name in open_layers)
        shares = {name: rest * means[name] / total for name in open_layers}
        full = [name for name in open_layers if shares[name] > room[name]]
        if not full:
            break
        for name in full:
            ideal[name] = room[name]
            rest -= room[name]
            open_layers.remove(name)
    ideal.update(shares)
    growth = {name: math.floor(value) for name, value in ideal.items()}
    by_remainder = sorted(open_layers, key=lambda name: growth[name] - ideal[name])
    for name in by_remainder[: freed - sum(growth.values())]:
        growth[name] += 1
    return growth


def test_connections_move_to_the_layer_with_the_larger_momentum() -> None:
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False))
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    policy = st.SNFS(sparsity=0.8, total_steps=10, update={"every": 1}, drop_fraction=0.5)
    optimizer = st.SparseOptimizer(base, model, policy)
    assert [t.active for t in optimizer.targets.values()] == [20, 20]
    model[0].weight.grad = torch.full((10, 10), 3.0)
    model[1].weight.grad = torch.full((10, 10), 1.0)
    optimizer.step()  # both free 10; the shares are 15 and 5
    assert [t.active for t in optimizer.targets.values()] == [25, 15]


def test_a_nearly_dense_layer_that_would_only_regrow_drops_its_zeros_share() -> None:
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False))
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    policy = st.SNFS(
        total_steps=10,
        update={"every": 1},
        drop_fraction=0.5,
        allocation={"kind": "explicit", "densities": {"0.weight": 0.9, "1.weight": 0.5}},
    )
    optimizer = st.SparseOptimizer(base, model, policy)
    model[0].weight.grad = torch.full((10, 10), 3.0)
    model[1].weight.grad = torch.full((10, 10), 1.0)
    optimizer.step()  # the first drops 9 of 90 and takes 19 in, all it has room for
    assert [t.active for t in optimizer.targets.values()] == [100, 40]


def test_a_nan_of_one_batch_does_not_stay_in_the_momentum() -> None:
    model, optimizer = wrap("momentum", "snfs")
    for step in range(STEPS):
        backward(model, step)
        target = optimizer.targets["hidden.weight"]
        target.param.grad[~target.mask] = float("nan")
        optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_momentum_is_dropped_after_the_last_update() -> None:
    model, optimizer = wrap("momentum", "snfs")
    (group,) = (group for _, group in optimizer._keeper.groups)
    train(model, optimizer, 0, 5)
    assert set(group.memory) == set(optimizer.targets)
    train(model, optimizer, 5, STEPS)
    assert not group.memory


def test_structures_are_refused() -> None:
    with pytest.raises(ValueError, match="structure"):
        st.SNFS(sparsity=0.5, total_steps=10, structure="constant_fan_in")
