"""Discrimination-aware pruning against a slow twin, and its early stop."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from channels_networks import Concatenated, Residual, images
from torch import Tensor, nn
from torch.nn import functional as F

import sparsetrain as st
from sparsetrain.channels import DiscriminationAware

X = torch.randn(12, 1, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.randint(3, (12,), generator=torch.Generator().manual_seed(1))
DATA = [(X[:6], Y[:6]), (X[6:], Y[6:])]


def chain() -> nn.Sequential:
    """Two convolutions, a norm between them, and a head."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 3),
    ).eval()


def pruned(model: nn.Module, method: DiscriminationAware, ratio: Any = None) -> Any:
    options: dict[str, Any] = {"calibration": DATA, "loss_fn": F.cross_entropy}
    ratio = ratio or {"0": 0.5}
    return st.channels.prune(model, X, method, ratio, **options, measure_latency=False)


def twin(
    model: nn.Sequential, count: int, rate: float
) -> tuple[list[int], nn.Sequential, list[float]]:
    """The paper's algorithm 2 for the first layer, by plain autograd, one channel at a time.

    Returns the channels, the network, and the loss before each channel and at the end.
    """
    reference, model = copy.deepcopy(model), copy.deepcopy(model)
    conv, whole = model[3], model[3].weight.detach().clone()
    mask = torch.zeros(6)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        wanted = reference[:4](x).detach()
        return F.mse_loss(model[:4](x), wanted) + F.cross_entropy(model(x), y)

    def mean_loss() -> float:
        return sum(float(loss_of(x, y).detach()) for x, y in DATA) / len(DATA)

    with torch.no_grad():
        conv.weight.zero_()
    losses = [mean_loss()]
    chosen: list[int] = []
    while len(chosen) < count:
        gradient = sum(torch.autograd.grad(loss_of(x, y), conv.weight)[0] for x, y in DATA)
        sizes = [float(gradient[:, c].norm()) if c not in chosen else -1.0 for c in range(6)]
        chosen.append(sizes.index(max(sizes)))
        mask[chosen[-1]] = 1
        with torch.no_grad():
            conv.weight[:, chosen[-1]] = whole[:, chosen[-1]]
        optimizer = torch.optim.SGD(
            conv.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4, nesterov=True
        )
        for x, y in DATA:
            optimizer.zero_grad()
            loss_of(x, y).backward()
            conv.weight.grad *= mask.view(1, 6, 1, 1)
            optimizer.step()
        losses.append(mean_loss())
    return sorted(chosen), model, losses


def test_against_a_slow_twin() -> None:
    model = chain()
    method = DiscriminationAware(losses=0, passes=0, rounds=6, learning_rate=0.05)
    before = copy.deepcopy(model.state_dict())
    result = pruned(model, method)
    kept, expected, _ = twin(model, 3, 0.05)
    assert result.removed == {"0": sorted({*range(6)} - {*kept})}
    torch.testing.assert_close(result.model[3].weight, expected[3].weight[:, kept])
    torch.testing.assert_close(result.model[3].bias, expected[3].bias)
    torch.testing.assert_close(result.model(X), expected(X))
    torch.testing.assert_close(model.state_dict(), before)
    assert all(p.grad is None for p in result.model.parameters())


def test_frozen_layers_are_fitted_as_others_and_stay_frozen() -> None:
    method = DiscriminationAware(losses=0, passes=0)
    expected = pruned(chain(), method).model
    model = pruned(chain().requires_grad_(False), method).model
    torch.testing.assert_close(model.state_dict(), expected.state_dict())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_channel_that_the_loss_needs_stays() -> None:
    """Its reconstruction error is small beside the others', but classes depend on it alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    with torch.no_grad():
        for layer in model:
            layer.weight.zero_()
            layer.bias.zero_()
        model[0].weight.copy_(torch.eye(4))
        model[1].weight.copy_(torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.3])))
        model[2].weight[:, 3] = torch.tensor([10.0, -10.0])
    x = torch.randn(64, 4)
    data = [(x, (x[:, 3] < 0).long())]
    options: dict[str, Any] = {"calibration": data, "loss_fn": F.cross_entropy}
    method = DiscriminationAware(losses=0, passes=0, rounds=4, loss_weight=1.0)
    found = st.channels.prune(model, x, method, {"0": 0.75}, **options)
    assert found.removed == {"0": [0, 1, 2]}
    blind = DiscriminationAware(losses=0, passes=0, rounds=4, loss_weight=0.0)
    found = st.channels.prune(model, x, blind, {"0": 0.75}, **options)
    assert 3 in found.removed["0"]


def test_classifiers_in_between_are_trained_and_used() -> None:
    model = chain()
    calls: list[int] = []
    model[6].register_forward_hook(lambda *_: calls.append(1))  # copies of the model have it too
    found = pruned(model, DiscriminationAware(losses=1, passes=2))
    with_classifier, calls[:] = len(calls), []
    pruned(model, DiscriminationAware(losses=0, passes=2))
    # The channels answer to the classifier behind layer 3, so that the rest is not run for them.
    assert with_classifier < len(calls) / 2
    before, after = model.state_dict(), found.model.state_dict()
    kept = [c for c in range(6) if c not in found.removed["0"]]
    for name in ("0.weight", "1.running_mean"):  # the network was trained with it
        assert not torch.allclose(after[name], before[name][kept])
    assert after.keys() == before.keys()


@pytest.mark.parametrize("tolerance", [1e9, 0.3, 0.1, 0.03, 1e-9])
def test_it_stops_when_little_is_gained(tolerance: float) -> None:
    model = chain()
    with torch.no_grad():
        model[3].weight *= 5.0
    _, _, losses = twin(model, 5, 0.05)
    gains = [abs(a - b) / losses[0] for a, b in pairwise(losses)]
    expected = next((n for n, gain in enumerate(gains, start=1) if gain <= tolerance), 5)
    method = DiscriminationAware(
        losses=0, passes=0, rounds=5, tolerance=tolerance, learning_rate=0.05
    )
    assert pruned(model, method, {"0": 0.2}).layers["0"] == (6, expected)


def test_shortcuts_and_concatenations_and_the_caller_s_generator() -> None:
    rules = [{"match": "inner", "dense": True}]  # a grouped convolution is next
    state = torch.get_rng_state()
    for model, kept in ((Residual(), rules), (Concatenated(), [])):
        torch.manual_seed(0)
        data = [(images(4), torch.arange(4) % 3)]
        state = torch.get_rng_state()
        result = st.channels.prune(
            model, images(4), "dcp", 0.5, rules=kept, calibration=data, loss_fn=F.cross_entropy
        )
        assert torch.equal(torch.get_rng_state(), state)
        assert result.removed and result.model(images(4)).isfinite().all()


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (Residual(), {}, "'dcp' needs data"),
        (Residual(), {"calibration": DATA}, "'dcp' needs a loss"),
        (Residual(), {"calibration": iter(DATA), "loss_fn": F.cross_entropy}, "several times"),
        (Residual(), {"calibration": DATA, "loss_fn": F.cross_entropy}, "cannot be done for grou"),
        (
            nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 2, 1)),
            {"calibration": DATA, "loss_fn": F.cross_entropy},
            "gives class scores",
        ),
    ],
)
def test_what_it_needs(model: nn.Module, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        st.channels.prune(model, X, "dcp", 0.5, **options)
