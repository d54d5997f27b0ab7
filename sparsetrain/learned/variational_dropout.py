"""Sparse variational dropout (Molchanov et al. 2017)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from sparsetrain.learned.base import LearnedMask, accumulate, put, where_positive
from sparsetrain.learned.sharing import Sharing

#: -KL = K1 sigmoid(K2 + K3 log_alpha) - 0.5 log(1 + 1/alpha) - K1, eq. 14.
K1, K2, K3 = 0.63576, 1.87320, 1.48695
_CLIP = 8.0
_UNDER_ROOT = 1e-8
_TINY = 1e-30  # for weights of exactly 0, whose numerators are 0 too


class VariationalDropoutMask(LearnedMask):
    """Gaussian noise of variance sigma^2 on every weight; a weight that drowns in it is dropped.

    log alpha = log sigma^2 - log w^2, clipped to [-8, 8]; kept below `threshold`.

    Args:
        sharing: one gate a weight.
        log_sigma2: its start, of the weight's shape.
        threshold: of log alpha.
        local: whether the layer's activations get the noise (local reparameterisation, Kingma et
            al. 2015), or the weights themselves.
        clip: whether training passes, too, leave out the mean of weights above the threshold, as
            the authors' code does.
    """

    def __init__(
        self,
        sharing: Sharing,
        log_sigma2: Tensor,
        *,
        threshold: float = 3.0,
        local: bool = True,
        clip: bool = True,
    ) -> None:
        super().__init__(sharing)
        self.log_sigma2 = Parameter(log_sigma2)
        self.threshold = threshold
        self.local = local
        self.clip = clip

    def sampled(self, weight: Tensor) -> Tensor:
        """The mean, with noise when the layer cannot add it to its output."""
        mean = self.evaluated(weight) if self.clip else weight
        if self.local:
            return mean
        variance = self.variance(weight)
        return mean + torch.sqrt(variance + _UNDER_ROOT) * torch.randn_like(weight)

    def evaluated(self, weight: Tensor) -> Tensor:
        """The means of weights below the threshold."""
        return weight * self._kept(weight)

    def mask(self, weight: Tensor) -> Tensor:
        """Where log alpha < threshold."""
        return self._kept(weight) > 0

    def _kept(self, weight: Tensor) -> Tensor:
        """1 where sigma^2 < exp(threshold) w^2, else 0."""
        square = weight.detach().square()
        sigma2 = torch.exp(self.log_sigma2.detach())
        return where_positive(square.mul_(math.exp(self.threshold)).sub_(sigma2))

    def variance(self, weight: Tensor) -> Tensor:
        """exp(clipped log alpha) w^2, the variance of each weight."""
        variance: Tensor = _Variance.apply(weight, self.log_sigma2)  # type: ignore[no-untyped-call]
        return variance

    def hook(self, module: nn.Module) -> list[RemovableHandle]:
        """Noise on the layer's output."""
        return [module.register_forward_hook(_ActivationNoise(self))] if self.local else []

    def log_alpha(self, weight: Tensor) -> Tensor:
        """log sigma^2 - log w^2, clipped; weights of 0 have the highest."""
        return (self.log_sigma2 - weight.square().log()).clamp(-_CLIP, _CLIP)

    def penalty(self, weight: Tensor) -> Tensor:
        """The KL divergence from the log-uniform prior, summed over the weights."""
        log_alpha = self.log_alpha(weight)
        fitted = K1 * torch.sigmoid(K2 + K3 * log_alpha)
        return (K1 - fitted + 0.5 * F.softplus(-log_alpha)).sum()

    def add_penalty_gradient(self, weight: Parameter, strength: float) -> None:
        """In closed form."""
        mean = weight.detach()
        log_alpha = self.log_sigma2.detach() - mean.square().log_()
        inside = where_positive(_CLIP - log_alpha.abs())
        share = (log_alpha * K3).add_(K2).sigmoid_()
        slope = share.sub_(share * share).mul_(-K1 * K3)
        slope.sub_(log_alpha.neg_().sigmoid_(), alpha=0.5).mul_(inside)
        accumulate(self.log_sigma2, slope, strength)
        accumulate(weight, slope.div_(mean + _TINY), -2 * strength)

    def margins(self, weight: Tensor) -> Tensor:
        """log alpha below the threshold, not clipped."""
        log_alpha = self.log_sigma2.detach() - weight.detach().square().log()
        return self.threshold - log_alpha

    def put_across(self, weight: Tensor, gates: Tensor, *, keep: bool) -> None:
        """By log sigma^2; weights of exactly 0 stay dropped."""
        border = self.threshold + weight.detach().reshape(-1)[gates].square().log()
        put(self.log_sigma2, gates, border.clamp_min(-80.0), above=not keep)


class _Variance(torch.autograd.Function):
    """exp(clip(log sigma^2 - log w^2)) w^2, without a logarithm."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, log_sigma2: Tensor) -> Tensor:
        square = weight * weight
        above = torch.maximum(torch.exp(log_sigma2), square * math.exp(-_CLIP))
        return torch.minimum(above, square.mul_(math.exp(_CLIP)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        weight, log_sigma2, variance = ctx.saved_tensors
        clipped = (torch.exp(log_sigma2) - variance).sign().abs()  # 1 where it is, else 0
        whole = grad * variance
        # Clipped, the variance is w^2 times a constant; otherwise it is sigma^2.
        of_square = whole * clipped
        return 2 * of_square / (weight + _TINY), whole - of_square


class _ActivationNoise:
    """A hook that adds the noise which weights of this variance make in the layer's output."""

    def __init__(self, mask: VariationalDropoutMask) -> None:
        self.mask = mask

    def __call__(self, module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not module.training:
            return None
        with torch.autocast(output.device.type, enabled=False):  # half precision has no 1e-8
            weight = module.parametrizations.weight.original
            variance = self.mask.variance(weight)
            x = args[0].to(weight.dtype)
            spread = torch.sqrt(_product(module, x * x, variance) + _UNDER_ROOT)
            return output + (spread * torch.randn_like(spread)).to(output.dtype)


def _product(module: Any, x: Tensor, weight: Tensor) -> Tensor:
    """What the layer computes with another weight and no bias."""
    if isinstance(module, nn.Linear):
        return F.linear(x, weight)
    convolved: Tensor = module._conv_forward(x, weight, None)
    return convolved
