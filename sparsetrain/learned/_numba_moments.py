"""Variational dropout's arithmetic in one pass over memory, for float32. Importing needs numba."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from sparsetrain._numba_threads import numba_chunks
from sparsetrain.learned._numba_math import exp, log, use_widest_registers

_f = np.float32
_LOOP: dict[str, Any] = {
    "fastmath": {"contract", "nsz"},
    "cache": True,
    "boundscheck": False,
    "error_model": "numpy",
}
# Loops of their own become vector code; within a parallel loop they do not.
_PARALLEL = {**_LOOP, "parallel": True}
_ZERO, _HALF, _ONE, _TWO = _f(0.0), _f(0.5), _f(1.0), _f(2.0)
_TINY = _f(1e-30)
_THREE_HALVES = _f(1.5)


def moments(weight: Tensor, log_sigma2: Tensor, above: float, clip: float) -> tuple[Tensor, Tensor]:
    """Masked mean and clipped variance; see `variational_dropout`."""
    mean, variance = torch.empty_like(weight), torch.empty_like(weight)
    bounds = _f(above), _f(math.exp(-clip)), _f(math.exp(clip))
    _run(_moments_loop, _moments, *_flat(weight, log_sigma2, mean, variance), *bounds)
    return mean, variance


def moments_gradients(
    weight: Tensor,
    log_sigma2: Tensor,
    of_mean: Tensor,
    of_variance: Tensor,
    above: float,
    clip: float,
) -> tuple[Tensor, Tensor]:
    """Gradients on weight and log sigma^2 from those on mean and variance."""
    of_weight, of_log = torch.empty_like(weight), torch.empty_like(weight)
    arrays = _flat(weight, log_sigma2, of_mean, of_variance, of_weight, of_log)
    bounds = _f(above), _f(math.exp(-clip)), _f(math.exp(clip))
    _run(_moments_gradients_loop, _moments_gradients, *arrays, *bounds)
    return of_weight, of_log


def add_kl_gradients(
    weight: Tensor,
    log_sigma2: Tensor,
    of_weight: Tensor,
    of_log: Tensor,
    strength: float,
    constants: tuple[float, float, float],
    clip: float,
) -> None:
    """Add the gradients of strength * KL to those of weight and log sigma^2."""
    k1, k2, k3 = constants
    numbers = _f(strength), _f(k1 * k3), _f(k2), _f(k3), _f(clip)
    arrays = _flat(weight, log_sigma2, of_weight, of_log)
    _run(_add_kl_gradients_loop, _add_kl_gradients, *arrays, *numbers)


def _run(loop: Any, parallel: Any, *arguments: Any) -> None:
    """One thread runs the loop itself; starting a parallel one takes longer than a small layer."""
    if torch.get_num_threads() == 1:
        loop(*arguments)
        return
    with numba_chunks() as chunks:
        parallel(*arguments, chunks)


def _flat(*tensors: Tensor) -> list[Any]:
    # `Tensor.numpy` would fix the size of the storage, which `fully_shard` frees after a pass.
    return [np.from_dlpack(tensor.detach()).ravel() for tensor in tensors]


@njit(**_PARALLEL)
def _moments(weight, log_sigma2, mean, variance, above, lowest, highest, chunks):  # type: ignore[no-untyped-def]
    size = weight.size
    for chunk in prange(chunks):
        a, b = size * chunk // chunks, size * (chunk + 1) // chunks
        _moments_loop(
            weight[a:b], log_sigma2[a:b], mean[a:b], variance[a:b], above, lowest, highest
        )


@njit(**_LOOP)
def _moments_loop(weight, log_sigma2, mean, variance, above, lowest, highest):  # type: ignore[no-untyped-def]
    for i in range(weight.size):
        w, sigma2 = weight[i], exp(log_sigma2[i])
        square = w * w
        variance[i] = min(max(sigma2, square * lowest), square * highest)
        mean[i] = w if sigma2 < square * above else _ZERO


@njit(**_PARALLEL)
def _moments_gradients(  # type: ignore[no-untyped-def]
    weight, log_sigma2, of_mean, of_variance, of_weight, of_log, above, lowest, highest, chunks
):
    size = weight.size
    for chunk in prange(chunks):
        a, b = size * chunk // chunks, size * (chunk + 1) // chunks
        _moments_gradients_loop(
            weight[a:b],
            log_sigma2[a:b],
            of_mean[a:b],
            of_variance[a:b],
            of_weight[a:b],
            of_log[a:b],
            above,
            lowest,
            highest,
        )


@njit(**_LOOP)
def _moments_gradients_loop(  # type: ignore[no-untyped-def]
    weight, log_sigma2, of_mean, of_variance, of_weight, of_log, above, lowest, highest
):
    for i in range(weight.size):
        w, sigma2, slope = weight[i], exp(log_sigma2[i]), of_variance[i]
        square = w * w
        low, high = sigma2 < square * lowest, sigma2 > square * highest
        factor = highest if high else (lowest if low else _ZERO)
        kept = of_mean[i] if sigma2 < square * above else _ZERO
        of_weight[i] = kept + _TWO * slope * w * factor
        of_log[i] = _ZERO if (low or high) else slope * sigma2


@njit(**_PARALLEL)
def _add_kl_gradients(  # type: ignore[no-untyped-def]
    weight, log_sigma2, of_weight, of_log, strength, k1_k3, k2, k3, clip, chunks
):
    size = weight.size
    for chunk in prange(chunks):
        a, b = size * chunk // chunks, size * (chunk + 1) // chunks
        _add_kl_gradients_loop(
            weight[a:b],
            log_sigma2[a:b],
            of_weight[a:b],
            of_log[a:b],
            strength,
            k1_k3,
            k2,
            k3,
            clip,
        )


@njit(**_LOOP)
def _add_kl_gradients_loop(  # type: ignore[no-untyped-def]
    weight, log_sigma2, of_weight, of_log, strength, k1_k3, k2, k3, clip
):
    use_widest_registers()
    share_at_0, less_than_3_halves = exp(-k2), _THREE_HALVES - k3
    for i in range(weight.size):
        w = weight[i]
        log_alpha = log_sigma2[i] - _TWO * log(abs(w))
        # With root = sqrt(alpha): 1 / (1 + exp(k2 + k3 log_alpha)) = e / (e + root^3), where e is
        # nearly constant, as k3 is nearly 3/2. So one exponential and one division do for all.
        root, x = exp(_HALF * log_alpha), less_than_3_halves * log_alpha
        e = share_at_0 * (_ONE + x * (_ONE + x * _HALF))
        cube, one_and_alpha, divisor = root * root * root, _ONE + root * root, w + _TINY
        square = (e + cube) * (e + cube)
        slope = -strength * (k1_k3 * e * cube * one_and_alpha + _HALF * square)
        slope /= square * one_and_alpha * divisor
        slope = slope if abs(log_alpha) < clip else _ZERO
        of_log[i] += slope * divisor
        of_weight[i] -= _TWO * slope
