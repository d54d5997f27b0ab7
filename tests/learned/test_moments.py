"""Variational dropout's loops in numba against torch's passes in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor
from torch.nn import Parameter

from sparsetrain.learned import moments as ours

pytest.importorskip("numba")
SIZES = [1, 7, 64, 1001]


@pytest.fixture(params=[1, 2], autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def drawn(size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Weights and log sigma^2 with log alpha on both sides of both clips, and zeros."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(size, generator=generator) * 0.1
    weight[::5] = 0.0
    log_alpha = torch.rand(size, generator=generator) * 24 - 12
    return weight, log_alpha + weight.square().clamp_min(1e-8).log()


def numba_is_used(*tensors: Tensor) -> bool:
    return ours._loops_for(*tensors) is not None


@settings(max_examples=20)
@given(size=some.sampled_from(SIZES), seed=some.integers(0, 99), above=some.floats(0.1, 50.0))
def test_moments(size: int, seed: int, above: float) -> None:
    weight, log_sigma2 = drawn(size, seed)
    assert numba_is_used(weight, log_sigma2)
    found = ours.moments(weight, log_sigma2, above)
    expected = ours.moments(weight.double(), log_sigma2.double(), above)
    border = (log_sigma2.double().exp() / weight.double().square() / above).log().abs() < 1e-5
    for mine, twin in zip(found, expected, strict=True):
        torch.testing.assert_close(mine[~border], twin[~border].float(), rtol=1e-5, atol=1e-12)


def test_no_mask_above_infinity() -> None:
    weight, log_sigma2 = drawn(64, 0)
    mean, _ = ours.moments(weight, log_sigma2, math.inf)
    assert torch.equal(mean, weight)


@settings(max_examples=20)
@given(size=some.sampled_from(SIZES), seed=some.integers(0, 99))
def test_gradients_of_moments(size: int, seed: int) -> None:
    weight, log_sigma2 = drawn(size, seed)
    of_mean, of_variance = torch.randn(2, size)
    found = ours.moments_gradients(weight, log_sigma2, of_mean, of_variance, 20.0)
    doubles = [t.double() for t in (weight, log_sigma2, of_mean, of_variance)]
    expected = ours.moments_gradients(*doubles, 20.0)
    ratio = doubles[1] - doubles[0].square().log()
    near = torch.stack([(ratio - b).abs() for b in (-8.0, 8.0, math.log(20.0))]).amin(0) < 1e-4
    for mine, twin in zip(found, expected, strict=True):
        torch.testing.assert_close(mine[~near], twin[~near].float(), rtol=1e-4, atol=1e-10)


@settings(max_examples=20)
@given(size=some.sampled_from(SIZES), seed=some.integers(0, 99), strength=some.floats(1e-6, 10.0))
def test_gradients_of_the_divergence(size: int, seed: int, strength: float) -> None:
    weight, log_sigma2 = drawn(size, seed)
    pairs = []
    for dtype in (torch.float32, torch.float64):
        pair = [Parameter(t.to(dtype)) for t in (weight, log_sigma2)]
        for parameter in pair:
            parameter.grad = torch.full_like(parameter, 0.25)
        ours.add_kl_gradients(pair[0], pair[1], strength)
        pairs.append([parameter.grad for parameter in pair])
    near = (log_sigma2 - weight.square().log()).abs().sub(8.0).abs() < 1e-3
    for mine, twin in zip(*pairs, strict=True):
        assert mine is not None and twin is not None
        torch.testing.assert_close(mine[~near], twin[~near].float(), rtol=1e-4, atol=1e-5)


def test_the_slope_of_the_divergence_is_that_of_the_formula() -> None:
    log_alpha = torch.linspace(-7.99, 7.99, 4001)
    found = []
    for dtype in (torch.float32, torch.float64):
        weight, log_sigma2 = (
            Parameter(torch.ones_like(log_alpha, dtype=dtype)),
            Parameter(log_alpha.to(dtype)),
        )
        for parameter in (weight, log_sigma2):
            parameter.grad = torch.zeros_like(parameter)
        ours.add_kl_gradients(weight, log_sigma2, 1.0)
        assert log_sigma2.grad is not None
        found.append(log_sigma2.grad.double())
    torch.testing.assert_close(found[0], found[1], rtol=5e-6, atol=0)


def test_exp_and_log() -> None:
    numba = pytest.importorskip("numba")
    from sparsetrain.learned import _numba_math

    @numba.njit
    def both(x, e, l):  # type: ignore[no-untyped-def] # noqa: E741
        for i in range(x.size):
            e[i], l[i] = _numba_math.exp(x[i]), _numba_math.log(abs(x[i]))

    x = torch.cat([torch.linspace(-87, 88, 20_001), torch.logspace(-30, 30, 20_001)])
    exponential, logarithm = torch.empty_like(x), torch.empty_like(x)
    both(x.numpy(), exponential.numpy(), logarithm.numpy())
    in_range = x.abs() < 87
    expected = x.double().exp()[in_range].float()
    torch.testing.assert_close(exponential[in_range], expected, rtol=3e-7, atol=0)
    expected = x.double().abs().log().float()
    torch.testing.assert_close(logarithm[x != 0], expected[x != 0], rtol=3e-7, atol=3e-7)
