"""N:M with SR-STE against equation 10 of Zhou et al. 2021, group by group."""

from __future__ import annotations

import pytest
import torch
from runs import OPTIMIZERS, STEPS, SmallNet, train, wrap
from torch import Tensor, nn
from twins import straight_through

import sparsetrain as st

DECAY = 0.01


def n_m_by_hand(weight: Tensor, n: int, m: int) -> Tensor:
    """The n largest of every m inputs, a group at a time; equal weights: the lower index."""
    columns = weight.flatten(2) if weight.dim() > 2 else weight.unsqueeze(2)
    mask = torch.zeros(columns.shape, dtype=torch.bool)
    for row in range(columns.shape[0]):
        for place in range(columns.shape[2]):
            for start in range(0, columns.shape[1], m):
                group = range(start, start + m)
                best = sorted(group, key=lambda i: (-abs(float(columns[row, i, place])), i))[:n]
                mask[row, best, place] = True
    return mask.view(weight.shape)


def sr_ste_by_hand(steps: int) -> tuple[SmallNet, dict[str, Tensor]]:
    latent, seen = SmallNet(), SmallNet()
    base = OPTIMIZERS["momentum"](latent.parameters())
    names = ["conv.weight", "hidden.weight", "head.weight"]
    masks = {name: n_m_by_hand(latent.get_parameter(name).detach(), 2, 4) for name in names}
    for step in range(steps):
        straight_through(latent, seen, masks, step)
        for name, mask in masks.items():
            weight = latent.get_parameter(name)
            weight.grad.add_(torch.where(mask, 0.0, weight.detach()), alpha=DECAY)
        base.step()
        for name in names:
            masks[name] = n_m_by_hand(latent.get_parameter(name).detach(), 2, 4)
    with torch.no_grad():
        for name, mask in masks.items():
            latent.get_parameter(name)[~mask] = 0.0
    return latent, masks


def test_training_equals_sr_ste_by_hand() -> None:
    model, optimizer = wrap("momentum", st.NMSparse(n=2, m=4, decay=DECAY))
    first = optimizer.masks()
    train(model, optimizer, 0, STEPS)
    twin, masks = sr_ste_by_hand(STEPS)
    for name, mask in optimizer.masks().items():
        assert torch.equal(mask, masks[name])
    for name, weight in model.named_parameters():
        assert torch.equal(weight, twin.get_parameter(name))
    assert any((mask != first[name]).any() for name, mask in masks.items())


def test_decay_pulls_pruned_weights_only() -> None:
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
    base = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = st.SparseOptimizer(base, model, st.NMSparse(n=2, m=4, decay=0.5))
    model.weight.grad = torch.zeros(1, 4)
    optimizer.step()
    assert model.weight.tolist() == [[4.0, 3.0, 0.0, 0.0]]
    latent = optimizer.state_dict()["sparsetrain"]["targets"]["weight"]["latent"]
    assert latent.tolist() == [[4.0, 3.0, 1.0, 0.5]]


def test_sparsity_stands_for_n() -> None:
    assert st.NMSparse(sparsity=0.75).n == 1
    assert st.NMSparse(sparsity=0.5, m=8).n == 4
    with pytest.raises(ValueError, match=r"0\.75"):
        st.NMSparse(sparsity=0.6)
    with pytest.raises(ValueError, match="disagree"):
        st.NMSparse(sparsity=0.5, n=1)
    with pytest.raises(ValueError, match="larger"):
        st.NMSparse(n=5, m=4)


def test_a_layer_that_m_does_not_divide_is_named() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 2))
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"1\.weight"):
        st.SparseOptimizer(base, model, st.NMSparse(n=2, m=4))
