"""Slimming: the penalty's gradient, what it holds, and removal by the scales that it leaves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from channels_networks import Residual, images
from torch import Tensor, nn
from torch.nn import functional as F

import sparsetrain as st

X = torch.randn(6, 1, 9, 9, generator=torch.Generator().manual_seed(0))
Y = torch.randint(3, (6,), generator=torch.Generator().manual_seed(1))


def network(bias: bool = True) -> nn.Sequential:
    """Two normalised convolutions and a head; no padding, so that constants stay constant."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, bias=bias),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 5 * 5, 3),
    )
    with torch.no_grad():
        for norm in (model[1], model[4]):
            norm.weight.normal_()
            norm.bias.uniform_(0.5, 1.5)
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
    return model


def wrapped(model: nn.Module, **options: Any) -> st.SparseOptimizer:
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return st.SparseOptimizer(base, model, st.Slimming(strength=0.03), **options)


def loss_of(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(X), Y)


def test_a_run_is_that_of_a_loss_with_the_penalty() -> None:
    model = network()
    twin = copy.deepcopy(model)
    optimizer = wrapped(model)
    by_hand = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for _ in range(5):
        penalty = 0.03 * (twin[1].weight.abs().sum() + twin[4].weight.abs().sum())
        torch.testing.assert_close(optimizer.penalty(), penalty.detach())
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
        by_hand.zero_grad()
        (loss_of(twin) + penalty).backward()
        by_hand.step()
    torch.testing.assert_close(model.state_dict(), twin.state_dict())
    assert optimizer.sparsity() == 0 and list(optimizer.targets) == ["1.weight", "4.weight"]
    optimizer.finalize()


def test_a_run_goes_on_from_a_checkpoint() -> None:
    model = network()
    optimizer = wrapped(model)
    loss_of(model).backward()
    optimizer.step()
    again = network()
    resumed = wrapped(again)
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (again, resumed)):
        o.zero_grad()
        loss_of(m).backward()
        o.step()
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("storage", ["csr", "auto"])
def test_no_storage_but_the_dense_one(storage: str) -> None:
    model = network()
    optimizer = wrapped(model, storage=storage)
    loss_of(model).backward()
    optimizer.step()
    assert {target.storage for target in optimizer.targets.values()} == {"masked"}


def test_rules_say_which_norms() -> None:
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    slimming = {"kind": "slimming", "strength": 0.1}
    recipe = {"policy": slimming, "rules": [{"match": "1.*", "dense": True}]}
    assert list(st.SparseOptimizer(base, model, recipe).targets) == ["4.weight"]
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    both = {
        "policy": {"kind": "static", "sparsity": 0.5},
        "rules": [{"module_type": "BatchNorm2d", "policy": slimming}],
    }
    targets = st.SparseOptimizer(base, model, both).targets
    assert sorted(targets) == ["0.weight", "1.weight", "3.weight", "4.weight", "7.weight"]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"kind": "slimming", "strength": 0.1, "sparsity": 0.5}, "leave 'sparsity' out"),
        ({"kind": "slimming", "strength": 0.1, "structure": "constant_fan_in"}, "'structure' out"),
        ({"kind": "slimming", "strength": 0.0}, "strength"),
        (
            {"rules": [{"match": "3", "policy": {"kind": "slimming", "strength": 0.1}}]},
            "names no batch norm scale, as 3.weight is none",
        ),
    ],
)
def test_bad_recipes(recipe: dict[str, Any], message: str) -> None:
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=message):
        st.SparseOptimizer(base, model, recipe)


def test_a_model_without_norms() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="the model has no batch norm scale"):
        wrapped(model)


# Removal.


def test_channels_of_all_layers_compete_as_they_are() -> None:
    model = network()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([5.0, -0.1, 4.0, 3.0, 0.3, 2.0]))
        model[4].weight.copy_(torch.tensor([-0.2, 0.4, 0.6, 0.5]))
    result = st.channels.prune(model, X, "slimming", 0.5)
    assert result.removed == {"0": [1, 4], "3": [0, 1, 3]}
    assert st.channels.prune(model, X, "slimming", 0.5, floor=0.5).removed == {
        "0": [1, 4, 5],
        "3": [0, 1],
    }


def test_channels_that_pass_several_norms_and_those_that_pass_none() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.first, self.second = nn.Conv2d(1, 3, 1), *map(nn.BatchNorm2d, (3, 3))
            self.mid, self.third = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.plain, self.head = nn.Conv2d(4, 5, 1), nn.Conv2d(5, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.second(self.first(self.conv(x)))
            return self.head(self.plain(self.third(self.mid(x))))

    model = Several()
    with torch.no_grad():
        model.first.weight.copy_(torch.tensor([1.0, -2.0, 3.0]))
        model.second.weight.copy_(torch.tensor([7.0, 1.0, -1.0]))  # means 4, 1.5 and 2
        model.third.weight.copy_(torch.tensor([2.5, 2.6, 2.7, 1.8]))
    result = st.channels.prune(model, X, "slimming", 0.3)
    assert result.removed == {"conv": [1], "mid": [3]} and result.layers["plain"] == (5, 5)
    with pytest.raises(ValueError, match="no channels pass one"):
        plain = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        st.channels.prune(plain, torch.randn(2, 3), "slimming", 0.5)


@pytest.mark.parametrize("bias", [True, False])
def test_folded_shifts_are_those_of_scales_of_0(bias: bool) -> None:
    model = network(bias).eval()
    before = copy.deepcopy(model.state_dict())
    masked = copy.deepcopy(model)
    result = st.channels.prune(model, X, st.channels.NetworkSlimming(fold=True), 0.5)
    with torch.no_grad():
        masked[1].weight[result.removed["0"]] = 0.0
        masked[4].weight[result.removed["3"]] = 0.0
    torch.testing.assert_close(result.model(X), masked(X), rtol=1e-5, atol=1e-5)
    plain = st.channels.prune(model, X, "slimming", 0.5).model(X)
    assert not torch.allclose(plain, masked(X), atol=1e-3)
    torch.testing.assert_close(model.state_dict(), before)
    in_place = st.channels.prune(
        model, X, st.channels.NetworkSlimming(fold=True), 0.5, in_place=True
    )
    torch.testing.assert_close(in_place.model(X), result.model(X))


def test_folding_through_groups() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2)
    )
    model[1].bias.data.fill_(1.5)
    model.eval()
    result = st.channels.prune(model, X, st.channels.NetworkSlimming(fold=True), 0.5)
    masked = copy.deepcopy(model)
    gone = result.removed["0"]
    with torch.no_grad():
        masked[1].weight[[*gone, *(channel + 2 for channel in gone)]] = 0.0
    torch.testing.assert_close(result.model(X), masked(X), rtol=1e-5, atol=1e-5)


def test_nowhere_to_fold() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, bias=False)
    )
    with pytest.raises(ValueError, match="3 cannot be folded: it has no bias"):
        st.channels.prune(model, X, st.channels.NetworkSlimming(fold=True), 0.5)


def test_through_a_live_optimizer() -> None:
    torch.manual_seed(0)
    model = Residual()
    optimizer = wrapped(model)
    for _ in range(2):
        optimizer.zero_grad()
        model(images()).square().mean().backward()
        optimizer.step()
    st.channels.prune(model, images(), "slimming", 0.5, optimizer=optimizer, in_place=True)
    for _ in range(2):
        optimizer.zero_grad()
        model(images()).square().mean().backward()
        optimizer.step()
    assert optimizer.targets["norm.weight"].numel == model.norm.num_features < 8
    sizes = model.norm.weight.abs().sum() + model.inner_norm.weight.abs().sum()
    torch.testing.assert_close(optimizer.penalty(), 0.03 * sizes.detach())
