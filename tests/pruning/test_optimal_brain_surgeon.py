"""Optimal brain surgeon against the constrained minimum of the quadratic, by brute force."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from runs import SmallNet, batch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsetrain as st
from sparsetrain.curvature import inverse_fisher_blocks
from sparsetrain.pruning.optimal_brain_surgeon import compensation

BATCHES = [batch(0), batch(1)]


def surgeon(model: nn.Module, sparsity: Any, **options: Any) -> st.PruneResult:
    return st.optimal_brain_surgeon(model, sparsity, BATCHES, F.cross_entropy, **options)


def constrained_minimum(curvature: Tensor, weight: Tensor, pruned: Tensor) -> Tensor:
    """The change d with (w + d)[pruned] = 0 and the smallest d' F d, by its KKT system."""
    size, count = len(weight), int(pruned.sum())
    rows = torch.eye(size, dtype=weight.dtype)[pruned]
    system = torch.zeros(size + count, size + count, dtype=weight.dtype)
    system[:size, :size] = curvature
    system[:size, size:] = rows.T
    system[size:, :size] = rows
    right = torch.cat([torch.zeros(size, dtype=weight.dtype), -weight[pruned]])
    return torch.linalg.solve(system, right)[:size]


@given(
    weights=some.integers(1, 14),
    block=some.integers(1, 6),
    share=some.floats(0, 1),
    seed=some.integers(0, 100),
)
def test_kept_weights_make_up_for_pruned_ones(
    weights: int, block: int, share: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(20, weights, dtype=torch.float64, generator=generator)
    weight = torch.randn(weights, dtype=torch.float64, generator=generator)
    mask = torch.rand(weights, generator=generator) >= share
    inverses = inverse_fisher_blocks(gradients, block, damping=0.1)
    change = compensation(weight, mask, inverses, "joint")
    separate = compensation(weight, mask, inverses, "separate")
    for start in range(0, weights, block):
        part = slice(start, start + block)
        size = len(weight[part])
        curvature = gradients[:, part].T @ gradients[:, part] / 20 + 0.1 * torch.eye(size).double()
        best = constrained_minimum(curvature, weight[part], ~mask[part])
        torch.testing.assert_close(change[part], best, atol=1e-9, rtol=1e-9)
        # WoodFisher: the sum of what single weights ask for.
        inverse = torch.linalg.inv(curvature)
        summed = torch.zeros(size, dtype=torch.float64)
        for q in (~mask[part]).nonzero().flatten():
            summed -= weight[part][q] / inverse[q, q] * inverse[:, q]
        torch.testing.assert_close(separate[part], summed, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("gradients", ["sample", "batch"])
def test_the_score_is_the_cost_of_each_weight(gradients: Any) -> None:
    model = SmallNet().double().eval()
    data = [(x.double(), y) for x, y in BATCHES]
    score = st.OptimalBrainSurgeon(block=7, damping=0.01, gradients=gradients)
    found = st.score(model, score, data, F.cross_entropy)
    for name, values in found.items():
        weight = model.get_parameter(name)
        rows = []
        for x, y in data:
            parts = [(x, y)] if gradients == "batch" else zip(x.split(1), y.split(1), strict=True)
            for part in parts:
                loss = F.cross_entropy(model(part[0]), part[1])
                rows.append(torch.autograd.grad(loss, weight)[0].flatten())
        whole = torch.stack(rows)
        flat = weight.detach().flatten()
        for start in range(0, len(flat), 7):
            part = slice(start, start + 7)
            own = whole[:, part]
            fisher = own.T @ own / len(rows) + 0.01 * torch.eye(own.shape[1]).double()
            expected = 0.5 * flat[part] ** 2 / torch.linalg.inv(fisher).diagonal()
            torch.testing.assert_close(values.flatten()[part], expected, rtol=1e-9, atol=0)


def test_the_model_stays_until_apply() -> None:
    model = SmallNet()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = surgeon(model, 0.6, rounds=3)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert result.sparsity == pytest.approx(0.6, abs=1e-3)
    result.apply()
    for name, mask in result.masks.items():
        weight = model.get_parameter(name)
        assert not weight[~mask].any()
        assert not torch.equal(weight[mask], before[name][mask])
    held = result.hold(torch.optim.SGD(model.parameters(), lr=0.1))
    assert held.sparsity() == result.sparsity


def test_weights_of_blocks_of_one_stay() -> None:
    model = SmallNet()
    result = surgeon(model, 0.6, score=st.OptimalBrainSurgeon(block=1))
    assert result.weights is not None
    for name, mask in result.masks.items():
        assert torch.equal(result.weights[name], model.get_parameter(name) * mask)


def test_what_was_pruned_before_makes_up_for_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 6, generator=generator).double(), torch.randn(40, 1, generator=generator)
    model, before = nn.Linear(6, 1, bias=False).double(), torch.tensor([1, 1, 0, 1, 1, 0]).bool()
    weight = torch.tensor([[1.0, -0.4, 0.0, 2.0, 0.1, 0.0]]).double()
    model.weight.data.copy_(weight)
    rows = 2 * (x @ weight.T - y) * x * before  # of (prediction - y)^2
    inverse = inverse_fisher_blocks(rows, 6, damping=0.01)
    score = st.OptimalBrainSurgeon(block=6, damping=0.01)
    result = st.optimal_brain_surgeon(
        model, 0.5, [(x, y.double())], F.mse_loss, score=score, update="separate"
    )
    mask = result.masks["weight"]
    assert int(mask.sum()) == 3
    assert not mask[0, [2, 5]].any()
    expected = (weight + compensation(weight, mask, inverse, "separate")) * mask
    assert result.weights is not None
    torch.testing.assert_close(result.weights["weight"], expected, rtol=1e-9, atol=1e-12)


def test_pruned_weights_stay_and_get_no_update() -> None:
    model = SmallNet()
    st.prune(model, "random", 0.3).apply()
    zeros = {n: p == 0 for n, p in model.named_parameters() if p.dim() > 1}
    result = surgeon(model, 0.6, rounds=2)
    assert result.weights is not None
    for name, mask in result.masks.items():
        assert not (mask & zeros[name]).any()
        assert not result.weights[name][~mask].any()


@pytest.mark.parametrize("update", ["joint", "separate"])
def test_the_loss_grows_less_than_without_the_update(update: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 16) @ torch.randn(16, 16)
    model = nn.Linear(16, 3)
    y = (x @ torch.randn(16, 3)).argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    score = st.OptimalBrainSurgeon(block=48, damping=1e-4)

    def loss_after(result: st.PruneResult) -> float:
        pruned = nn.Linear(16, 3)
        pruned.load_state_dict(model.state_dict())
        for name, mask in result.masks.items():
            weights = result.weights or {name: model.get_parameter(name).detach()}
            pruned.get_parameter(name).data.copy_(weights[name] * mask)
        return float(F.cross_entropy(pruned(x), y).detach())

    data = [(x, y)]
    with_update = st.optimal_brain_surgeon(
        model, 0.3, data, F.cross_entropy, score=score, update=update
    )
    plain = st.prune(model, score, 0.3, calibration=data, loss_fn=F.cross_entropy)
    assert torch.equal(with_update.masks["weight"], plain.masks["weight"])
    assert loss_after(with_update) < 0.9 * loss_after(plain)


def test_bad_input_is_named() -> None:
    model = SmallNet()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for options, message in [
        ({"rounds": 0}, "rounds=0 must be 1 or more"),
        ({"update": "jont"}, "update='jont' 'joint' or 'separate'"),
        ({"scope": "rows"}, "scope='rows' is not one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            surgeon(model, 0.5, **options)
    with pytest.raises(ValueError, match=r"no batch|empty"):
        st.optimal_brain_surgeon(model, 0.5, [], F.cross_entropy)
    with pytest.raises(ValueError, match="reads the batches several times"):
        st.optimal_brain_surgeon(model, 0.5, iter(BATCHES), F.cross_entropy, rounds=2)
    unused = nn.ModuleDict({"net": SmallNet(), "spare": nn.Linear(2, 2)})
    unused.forward = unused["net"].forward  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"saw nothing of spare\.weight"):
        surgeon(unused, 0.5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
