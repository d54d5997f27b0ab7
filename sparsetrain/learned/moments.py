"""Variational dropout's element-wise arithmetic: numba's where it can be, torch's otherwise.

In torch it is a chain of forty passes over tensors the size of the weight, and each waits for
memory; numba makes three loops of it.
"""

from __future__ import annotations

import math
from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import Parameter

from sparsetrain.learned.base import accumulate, keep_positive

#: -KL = K1 sigmoid(K2 + K3 log_alpha) - 0.5 log(1 + 1/alpha) - K1, eq. 14.
K1, K2, K3 = 0.63576, 1.87320, 1.48695
#: log alpha is clipped to [-CLIP, CLIP].
CLIP = 8.0
_LOWEST, _HIGHEST = math.exp(-CLIP), math.exp(CLIP)
_TINY = 1e-30  # for weights of exactly 0, whose numerators are 0 too


@cache
def _numba_moments() -> ModuleType | None:
    try:
        from sparsetrain.learned import _numba_moments
    except ImportError:
        return None
    return _numba_moments


def _loops_for(*tensors: Tensor) -> ModuleType | None:
    """numba's loops, for plain float32 tensors on the CPU."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    plain = all(
        t.device.type == "cpu" and t.dtype == torch.float32 and t.is_contiguous() for t in tensors
    )
    return _numba_moments() if plain else None


def moments(weight: Tensor, log_sigma2: Tensor, above: float) -> tuple[Tensor, Tensor]:
    """Mean and variance of each weight.

    Args:
        above: the mean is kept where sigma^2 < above * w^2; infinity keeps it everywhere.

    Returns:
        The mean, and exp(clip(log sigma^2 - log w^2)) w^2.
    """
    if loops := _loops_for(weight, log_sigma2):
        return loops.moments(weight, log_sigma2, above, CLIP)  # type: ignore[no-any-return]
    square, sigma2 = weight * weight, torch.exp(log_sigma2)
    variance = torch.minimum(torch.maximum(sigma2, square * _LOWEST), square * _HIGHEST)
    if math.isinf(above):
        return weight.clone(), variance
    return keep_positive(weight, square * above - sigma2), variance


def moments_gradients(
    weight: Tensor, log_sigma2: Tensor, of_mean: Tensor, of_variance: Tensor, above: float
) -> tuple[Tensor, Tensor]:
    """Gradients on weight and log sigma^2, from those on mean and variance."""
    if loops := _loops_for(weight, log_sigma2, of_mean, of_variance):
        found: tuple[Tensor, Tensor] = loops.moments_gradients(
            weight, log_sigma2, of_mean, of_variance, above, CLIP
        )
        return found
    square, sigma2 = weight * weight, torch.exp(log_sigma2)
    variance = torch.minimum(torch.maximum(sigma2, square * _LOWEST), square * _HIGHEST)
    # Clipped, the variance is w^2 times a constant; otherwise it is sigma^2.
    clipped = (sigma2 - variance).sign().abs()
    whole = of_variance * variance
    of_square = whole * clipped
    if not math.isinf(above):
        of_mean = keep_positive(of_mean, square * above - sigma2)
    return of_mean + 2 * of_square / (weight + _TINY), whole - of_square


def add_kl_gradients(weight: Parameter, log_sigma2: Parameter, strength: float) -> None:
    """Add the gradients of strength * sum of KL to those of weight and log sigma^2."""
    of_weight, of_log = weight.grad, log_sigma2.grad
    if of_weight is not None and of_log is not None:
        loops = _loops_for(weight, log_sigma2, of_weight, of_log)
        if loops is not None and weight.requires_grad and log_sigma2.requires_grad:
            constants = (K1, K2, K3)
            loops.add_kl_gradients(weight, log_sigma2, of_weight, of_log, strength, constants, CLIP)
            return
    mean = weight.detach().to(log_sigma2.dtype)
    log_alpha = torch.sub(log_sigma2.detach(), mean.abs().log_(), alpha=2)
    share = torch.sigmoid(K2 + K3 * log_alpha)
    slope = -K1 * K3 * (share - share * share) - 0.5 * torch.sigmoid(-log_alpha)
    slope = torch.ops.aten.hardtanh_backward(slope, log_alpha, -CLIP, CLIP)
    accumulate(log_sigma2, slope, strength)
    accumulate(weight, slope / (mean + _TINY), -2 * strength)
