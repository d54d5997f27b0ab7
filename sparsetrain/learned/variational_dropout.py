"""Sparse variational dropout (Molchanov et al. 2017)."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from sparsetrain.learned.base import LearnedMask, MaskFunction, gate_dtype, keep_positive, put
from sparsetrain.learned.moments import (
    CLIP,
    K1,
    K2,
    K3,
    add_kl_gradients,
    moments,
    moments_gradients,
)
from sparsetrain.learned.sharing import Sharing

_UNDER_ROOT = 1e-8


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
        self._variance: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_variance": None}  # part of a graph, which cannot be copied

    def sampled(self, weight: Tensor) -> Tensor:
        """The mean, with noise when the layer cannot add it to its output."""
        mean, variance = self.moments(weight)
        if self.local:
            self._variance = variance  # for the hook, which runs next
            return mean
        return mean + torch.sqrt(variance + _UNDER_ROOT) * torch.randn_like(weight)

    def evaluated(self, weight: Tensor) -> Tensor:
        """The means of weights below the threshold."""
        return keep_positive(weight, self._border(weight))

    def mask(self, weight: Tensor) -> Tensor:
        """Where log alpha < threshold."""
        return self._border(weight) > 0

    def _border(self, weight: Tensor) -> Tensor:
        """exp(threshold) w^2 - sigma^2, above 0 where the weight is kept."""
        square = weight.detach().square()
        return square.mul_(math.exp(self.threshold)).sub_(torch.exp(self.log_sigma2.detach()))

    def moments(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of each weight in a training pass.

        The variance is exp(clipped log alpha) w^2.
        """
        above = math.exp(self.threshold) if self.clip else math.inf
        mean, variance = _Moments.apply(weight, self.log_sigma2, above)  # type: ignore[no-untyped-call]
        return mean, variance

    def take_variance(self, weight: Tensor) -> Tensor:
        """The variance that came with the mean of this pass."""
        variance, self._variance = self._variance, None
        return self.moments(weight)[1] if variance is None else variance

    def hook(self, module: nn.Module) -> list[RemovableHandle]:
        """Noise on the layer's output."""
        return [module.register_forward_hook(_ActivationNoise(self))] if self.local else []

    def log_alpha(self, weight: Tensor) -> Tensor:
        """log sigma^2 - log w^2, clipped; weights of 0 have the highest."""
        return (self.log_sigma2 - weight.square().log()).clamp(-CLIP, CLIP)

    def penalty(self, weight: Tensor) -> Tensor:
        """The KL divergence from the log-uniform prior, summed over the weights."""
        log_alpha = self.log_alpha(weight)
        fitted = K1 * torch.sigmoid(K2 + K3 * log_alpha)
        return (K1 - fitted + 0.5 * F.softplus(-log_alpha)).sum()

    def add_penalty_gradient(self, weight: Parameter, strength: float) -> None:
        """In closed form."""
        add_kl_gradients(weight, self.log_sigma2, strength)

    def margins(self, weight: Tensor) -> Tensor:
        """log alpha below the threshold, not clipped."""
        log_alpha = self.log_sigma2.detach() - weight.detach().square().log()
        return self.threshold - log_alpha

    def put_across(self, weight: Tensor, gates: Tensor, *, keep: bool) -> None:
        """By log sigma^2; weights of exactly 0 stay dropped."""
        border = self.threshold + weight.detach().reshape(-1)[gates].square().log()
        put(self.log_sigma2, gates, border.clamp_min(-80.0), above=not keep)


class _Moments(MaskFunction):
    """Mean and variance of each weight."""

    @staticmethod
    def forward(weight: Tensor, log_sigma2: Tensor, above: float) -> tuple[Tensor, Tensor]:
        return moments(weight, log_sigma2, above)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.above = inputs[2]

    @staticmethod
    def backward(ctx: Any, of_mean: Tensor, of_variance: Tensor) -> Any:
        weight, log_sigma2 = ctx.saved_tensors
        return *moments_gradients(weight, log_sigma2, of_mean, of_variance, ctx.above), None


class _ActivationNoise:
    """A hook that adds the noise which weights of this variance make in the layer's output."""

    def __init__(self, mask: VariationalDropoutMask) -> None:
        self.mask = mask

    def __call__(self, module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not module.training:
            return None
        device = output.device.type
        is_mixed = torch.is_autocast_enabled(device)  # half precision has no 1e-8
        with torch.autocast(device, enabled=False) if is_mixed else nullcontext():
            weight = module.parametrizations.weight.original
            variance = self.mask.take_variance(weight.to(gate_dtype(weight)))
            x = args[0].to(variance.dtype)
            spread = torch.sqrt(_product(module, x * x, variance) + _UNDER_ROOT)
            return output + (spread * torch.randn_like(spread)).to(output.dtype)


def _product(module: Any, x: Tensor, weight: Tensor) -> Tensor:
    """What the layer computes with another weight and no bias."""
    if isinstance(module, nn.Linear):
        return F.linear(x, weight)
    convolved: Tensor = module._conv_forward(x, weight, None)
    return convolved
