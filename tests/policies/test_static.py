"""Static masks: chosen once, by chance or by score, and held."""

from __future__ import annotations

import pytest
import torch
from runs import STEPS, SmallNet, backward, train, wrap
from twins import top

import sparsetrain as st


def test_masks_never_change() -> None:
    model, optimizer = wrap("momentum", "static")
    masks = optimizer.masks()
    train(model, optimizer, 0, STEPS)
    assert all(torch.equal(mask, masks[name]) for name, mask in optimizer.masks().items())


def test_a_score_chooses_the_best_weights_of_each_layer() -> None:
    model, dense = SmallNet(), SmallNet()
    policy = st.Static(sparsity=0.8, score=st.Magnitude())
    optimizer = st.SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, policy)
    for name, mask in optimizer.masks().items():
        weight = dense.get_parameter(name).detach()
        assert torch.equal(mask, top(weight.abs(), int(mask.sum())))
        assert torch.equal(model.get_parameter(name).detach(), torch.where(mask, weight, 0.0))


def test_a_score_chooses_across_layers() -> None:
    model, dense = SmallNet(), SmallNet()
    policy = st.Static(sparsity=0.8, score="magnitude", allocation="global")
    optimizer = st.SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, policy)
    names = list(optimizer.targets)
    everything = torch.cat([dense.get_parameter(n).detach().view(-1) for n in names]).abs()
    masks = torch.cat([optimizer.masks()[n].view(-1) for n in names])
    assert torch.equal(masks, top(everything, round(0.2 * everything.numel())))


def test_a_score_may_look_at_gradients_that_are_there() -> None:
    model = SmallNet()
    backward(model, 0)
    scores = {n: (p.detach() * p.grad).abs() for n, p in model.named_parameters()}
    policy = st.Static(sparsity=0.8, score="taylor")
    optimizer = st.SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, policy)
    for name, mask in optimizer.masks().items():
        assert torch.equal(mask, top(scores[name], int(mask.sum())))


@pytest.mark.parametrize("structure", ["2:4", "constant_fan_in", {"kind": "block", "size": [1, 4]}])
def test_structures(structure: object) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
    policy = st.Static(sparsity=0.5, structure=structure, allocation="uniform")
    optimizer = st.SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, policy)
    for mask in optimizer.masks().values():
        groups = mask.unflatten(1, (-1, 4)).sum(2)
        if structure == "2:4":
            assert (groups == 2).all()
        elif structure == "constant_fan_in":
            assert (mask.sum(1) == 4).all()
        else:
            assert set(groups.unique().tolist()) <= {0, 4}
        assert int(mask.sum()) * 2 == mask.numel()
