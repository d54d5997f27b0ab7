"""Sparse variational dropout against Molchanov et al. 2017 and the exact noise of a layer."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from learned_twins import (
    approximate_kl,
    exact_kl,
    gradients,
    log_alpha_of,
    noise_variance,
    noisy_layer,
    numbers,
    output,
    seeded,
)
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import sparsetrain as st
from sparsetrain.learned.sharing import share
from sparsetrain.learned.variational_dropout import VariationalDropoutMask

SHAPE = (8, 6)
UNDER_ROOT = 1e-8
clips = pytest.mark.parametrize("clip", [True, False])


def drawn(shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, Tensor]:
    """Weights, and variances of log alpha from below -8 to above 8."""
    weight = numbers(0, *shape)
    wanted = torch.linspace(-11, 11, weight.numel(), dtype=torch.float64)
    order = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(0))
    return weight, weight.square().log() + wanted[order].view(shape)


def mask_of(
    log_sigma2: Tensor, *, local: bool = False, clip: bool = True
) -> VariationalDropoutMask:
    sharing = share("weight", tuple(log_sigma2.shape))
    return VariationalDropoutMask(sharing, log_sigma2.clone(), local=local, clip=clip)


def mean_by_hand(weight: Tensor, log_sigma2: Tensor, clip: bool) -> Tensor:
    kept = (log_alpha_of(weight, log_sigma2) < 3).double()
    return weight * kept if clip else weight


@clips
def test_noise_on_the_weights_and_its_gradients(clip: bool) -> None:
    weight, log_sigma2 = drawn()
    mask = mask_of(log_sigma2, clip=clip)
    with seeded():
        noise = torch.randn(SHAPE, dtype=torch.float64)

    def by_hand(weight: Tensor, log_sigma2: Tensor) -> Tensor:
        spread = torch.sqrt(noise_variance(weight, log_sigma2) + UNDER_ROOT)
        return mean_by_hand(weight, log_sigma2, clip) + spread * noise

    torch.testing.assert_close(output(mask, weight), by_hand(weight, log_sigma2))
    ours = gradients(lambda w, s: output(mask, w, log_sigma2=s), weight, log_sigma2)
    torch.testing.assert_close(ours, gradients(by_hand, weight, log_sigma2))


def test_gradients_are_those_of_finite_differences() -> None:
    weight, log_sigma2 = (tensor.requires_grad_() for tensor in drawn())
    mask = mask_of(log_sigma2.detach(), clip=False)
    assert torch.autograd.gradcheck(
        lambda w, s: output(mask, w, log_sigma2=s), (weight, log_sigma2), eps=1e-7
    )


def test_the_variance_is_that_of_the_clipped_log_alpha() -> None:
    weight, log_sigma2 = drawn()
    variance = mask_of(log_sigma2).moments(weight)[1].detach()
    torch.testing.assert_close(variance, noise_variance(weight, log_sigma2))
    ratio = variance / weight.square()
    torch.testing.assert_close(float(ratio.max()), math.exp(8))
    torch.testing.assert_close(float(ratio.min()), math.exp(-8))


@clips
@pytest.mark.parametrize("local", [True, False])
def test_evaluation_has_the_means_below_the_threshold(clip: bool, local: bool) -> None:
    weight, log_sigma2 = drawn()
    mask = mask_of(log_sigma2, local=local, clip=clip).eval()
    assert torch.equal(mask(weight), mean_by_hand(weight, log_sigma2, True))
    assert torch.equal(mask.mask(weight), log_alpha_of(weight, log_sigma2) < 3)


def test_a_weight_of_0_is_dropped_and_has_finite_gradients() -> None:
    mask = mask_of(torch.full((1, 2), -10.0))
    weight = nn.Parameter(torch.tensor([[0.0, 1.0]]))
    output(mask, weight).sum().backward()
    mask.add_penalty_gradient(weight, 1.0)
    assert torch.isfinite(weight.grad).all()
    assert torch.isfinite(mask.log_sigma2.grad).all()
    assert mask.mask(weight).tolist() == [[False, True]]


# The divergence.


def test_the_penalty_is_equation_14() -> None:
    weight, log_sigma2 = drawn()
    expected = approximate_kl(log_alpha_of(weight, log_sigma2)).sum()
    torch.testing.assert_close(mask_of(log_sigma2).penalty(weight), expected)


def test_the_penalty_is_close_to_the_exact_divergence() -> None:
    log_alpha = torch.linspace(-8, 8, 33, dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)
    ours = torch.stack([mask_of(value.view(1, 1)).penalty(one) for value in log_alpha]).detach()
    error = (ours - exact_kl(log_alpha)).abs()
    assert error.max() <= 9.4e-3
    assert error[log_alpha == 0] < 5e-3


def test_the_exact_divergence_falls_to_0_as_noise_grows() -> None:
    exact = exact_kl(torch.linspace(-8, 24, 33, dtype=torch.float64))
    assert (exact.diff() < 0).all()
    assert exact[-1].abs() < 1e-6


# Local reparameterisation.

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (1, 6)),
    "linear of tokens": (lambda: nn.Linear(6, 4, bias=False), (1, 2, 6)),
    "conv": (lambda: nn.Conv2d(3, 4, 3, padding=1), (1, 3, 3, 3)),
    "conv of groups": (
        lambda: nn.Conv2d(4, 6, 3, 2, padding=1, groups=2, padding_mode="circular"),
        (1, 4, 5, 5),
    ),
    "conv 1d": (lambda: nn.Conv1d(2, 3, 3, dilation=2), (1, 2, 7)),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


def wrapped(name: str, *, local: bool = True, clip: bool = True) -> tuple[nn.Module, Tensor]:
    """A layer with noisy weights of all kinds, and a batch of one."""
    make, shape = LAYERS[name]
    layer = make().double()
    layer.load_state_dict({k: numbers(3, *p.shape) for k, p in layer.state_dict().items()})
    policy = st.VariationalDropout(strength=1e-3, warm_up=0, local=local, clip=clip)
    st.SparseOptimizer(torch.optim.SGD(layer.parameters(), lr=0.1), layer, policy)
    mask = layer.parametrizations.weight[0]
    spread = numbers(4, *mask.log_sigma2.shape, scale=4.0)
    mask.log_sigma2.data.copy_(layer.parametrizations.weight.original.data.square().log() + spread)
    return layer, numbers(2, *shape)


def moments(name: str, layer: nn.Module, x: Tensor, clip: bool) -> tuple[Tensor, Tensor]:
    """Exact mean and variance of the outputs."""
    weight = layer.parametrizations.weight.original.detach()
    log_sigma2 = layer.parametrizations.weight[0].log_sigma2.detach()
    plain = LAYERS[name][0]().double()
    if layer.bias is not None:
        plain.bias.data.copy_(layer.bias.data)
    mean = mean_by_hand(weight, log_sigma2, clip)
    return noisy_layer(plain, x, mean, noise_variance(weight, log_sigma2))


@each_layer
@clips
def test_outputs_have_the_mean_and_variance_of_noisy_weights(name: str, clip: bool) -> None:
    layer, x = wrapped(name, clip=clip)
    mean, variance = moments(name, layer, x, clip)
    with seeded():
        ours = layer(x)
        torch.manual_seed(0)
        noise = torch.randn_like(ours)
    torch.testing.assert_close(ours, mean + torch.sqrt(variance + UNDER_ROOT) * noise)


@pytest.mark.parametrize("name", ["linear", "conv"])
@pytest.mark.parametrize("local", [True, False])
def test_samples_of_outputs_have_that_mean_and_variance(name: str, local: bool) -> None:
    layer, x = wrapped(name, local=local)
    mean, variance = moments(name, layer, x, True)
    count = 6_000 if local else 1_500
    with seeded(), torch.no_grad():
        if local:
            outputs = layer(x.expand(count, *x.shape[1:]))
        else:
            outputs = torch.cat([layer(x) for _ in range(count)])
    error = (outputs.mean(0, keepdim=True) - mean) / torch.sqrt(variance / count)
    assert error.abs().max() < 4.5
    ratio = outputs.var(0, keepdim=True) / variance
    assert (ratio - 1).abs().max() < 4.5 * math.sqrt(2 / count)


@each_layer
def test_evaluation_is_without_noise(name: str) -> None:
    layer, x = wrapped(name)
    torch.testing.assert_close(layer.eval()(x), moments(name, layer, x, True)[0])


def test_gradients_through_noisy_outputs() -> None:
    layer, _ = wrapped("linear", clip=False)
    x, bias = numbers(5, 7, 6), layer.bias.detach()
    weight = layer.parametrizations.weight.original.detach()
    log_sigma2 = layer.parametrizations.weight[0].log_sigma2.detach()
    with seeded():
        noise = torch.randn(7, 4, dtype=torch.float64)

    def ours(weight: Tensor, log_sigma2: Tensor, x: Tensor) -> Tensor:
        place = "parametrizations.weight."
        values = {f"{place}original": weight, f"{place}0.log_sigma2": log_sigma2}
        with seeded():
            return functional_call(layer, values, (x,))

    def by_hand(weight: Tensor, log_sigma2: Tensor, x: Tensor) -> Tensor:
        variance = F.linear(x**2, noise_variance(weight, log_sigma2))
        return F.linear(x, weight, bias) + torch.sqrt(variance + UNDER_ROOT) * noise

    torch.testing.assert_close(
        gradients(ours, weight, log_sigma2, x), gradients(by_hand, weight, log_sigma2, x)
    )
