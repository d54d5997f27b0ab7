"""Surgery against equation 4 of Guo et al. 2016: two thresholds, splicing, straight-through."""

from __future__ import annotations

import pytest
import torch
from runs import OPTIMIZERS, STEPS, SmallNet, train, wrap
from torch import Tensor, nn
from twins import straight_through

import sparsetrain as st

C_RATE, MARGIN = 0.5, 0.1


def surgery_by_hand(steps: int, start: int) -> tuple[SmallNet, dict[str, Tensor]]:
    """Latent weights in one network, masked copies of them in the forward pass of another."""
    latent, seen = SmallNet(), SmallNet()
    base = OPTIMIZERS["momentum"](latent.parameters())
    names = ["conv.weight", "hidden.weight", "head.weight"]
    masks = {n: torch.ones_like(latent.get_parameter(n), dtype=torch.bool) for n in names}
    thresholds: dict[str, float] = {}
    for step in range(steps):
        straight_through(latent, seen, masks, step)
        base.step()
        if step < start:
            continue
        for name in names:
            weight = latent.get_parameter(name).detach().abs()
            if name not in thresholds:
                values = weight.double().view(-1)
                spread = (values - values.mean()).square().mean().sqrt()
                thresholds[name] = max(float(values.mean() + C_RATE * spread), 0.0)
            t = thresholds[name]
            masks[name] = torch.where(
                weight <= (1 - MARGIN) * t,
                False,
                torch.where(weight > (1 + MARGIN) * t, True, masks[name]),
            )
    with torch.no_grad():
        for name, mask in masks.items():
            latent.get_parameter(name)[~mask] = 0.0
    return latent, masks


def test_training_with_the_papers_thresholds_equals_the_plain_loop() -> None:
    policy = st.DynamicNetworkSurgery(
        c_rate=C_RATE,
        gamma=0.0,
        total_steps=STEPS,
        update=st.UpdateSchedule(every=1, start=3, stop=1.0),
    )
    model, optimizer = wrap("momentum", policy)
    grown: list[int] = []
    optimizer.register_update_hook(lambda event: grown.append(sum(c.grown for c in event.layers)))
    train(model, optimizer, 0, STEPS)
    twin, masks = surgery_by_hand(STEPS, start=3)
    for name, mask in optimizer.masks().items():
        assert torch.equal(mask, masks[name])
    for name, weight in model.named_parameters():
        assert torch.equal(weight, twin.get_parameter(name))
    assert sum(grown) > 0, "nothing was spliced back, so the test says nothing about it"


def one_row(latent: list[float], mask: list[int], sparsity: float) -> list[int]:
    """The mask after one update by count of a row with given latent weights."""
    model = nn.Linear(len(latent), 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([latent]))
    policy = st.DynamicNetworkSurgery(sparsity=sparsity, total_steps=10)
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = st.SparseOptimizer(base, model, policy)
    optimizer.targets["weight"].replace_mask(torch.tensor([mask]).bool())
    optimizer.update_masks()
    return optimizer.masks()["weight"].int().tolist()[0]


def test_by_count_there_is_hysteresis() -> None:
    # 1.15 is above 1.0, but not by the factor 1.1 / 0.9 that a pruned weight needs.
    assert one_row([1.0, 1.15, 3.0, 0.1], [1, 0, 1, 1], 0.5) == [1, 0, 1, 0]
    assert one_row([1.0, 1.25, 3.0, 0.1], [1, 0, 1, 1], 0.5) == [0, 1, 1, 0]


def test_spliced_weights_come_back_with_their_latent_value() -> None:
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
    policy = st.DynamicNetworkSurgery(sparsity=0.5, total_steps=10, gamma=0.0)
    base = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = st.SparseOptimizer(base, model, policy)
    model.weight.grad = torch.zeros(1, 4)
    optimizer.step()
    assert model.weight.tolist() == [[4.0, 3.0, 0.0, 0.0]]
    # A pruned weight has a gradient (straight-through), grows unseen and is spliced back.
    model.weight.grad = torch.tensor([[0.0, 0.0, 0.0, -8.0]])
    optimizer.step()
    assert model.weight.tolist() == [[4.0, 0.0, 0.0, 9.0]]


def test_update_probability_decays() -> None:
    model = nn.Linear(8, 1, bias=False)
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    policy = st.DynamicNetworkSurgery(
        sparsity=0.5, total_steps=4000, gamma=0.01, power=1.0, update={"every": 1, "stop": 1.0}
    )
    optimizer = st.SparseOptimizer(base, model, policy)
    updates: list[int] = []
    optimizer.register_update_hook(lambda e: updates.append(e.step) if e.layers else None)
    model.weight.grad = torch.zeros_like(model.weight)
    for _ in range(4000):
        optimizer.step()
    expected = sum(1 / (1 + 0.01 * step) for step in range(4000))  # 370
    spread = sum((p := 1 / (1 + 0.01 * step)) * (1 - p) for step in range(4000)) ** 0.5
    assert abs(len(updates) - expected) < 4.5 * spread
    assert updates[0] == 0


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="not both"):
        st.DynamicNetworkSurgery(sparsity=0.5, c_rate=1.0, total_steps=10)
    with pytest.raises(ValueError, match="sparsity"):
        st.DynamicNetworkSurgery(total_steps=10)
    with pytest.raises(ValueError, match="structure"):
        st.DynamicNetworkSurgery(sparsity=0.5, total_steps=10, structure="2:4")
