"""Learned masks as one would write them down: the papers' equations, `parametrize` and autograd.

No loop is fused and no gradient is written by hand. The training loop adds `penalty` to the loss
and hands the gates to the optimizer as further parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F
from torch.nn.utils import parametrize

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
K1, K2, K3 = 0.63576, 1.87320, 1.48695
LEAST = 1e-6


class NaiveMask(nn.Module):
    """A parametrization weight -> masked weight with one tensor of gates."""

    def __init__(self, gates: Tensor) -> None:
        super().__init__()
        self.gates = Parameter(gates)

    def penalty(self) -> Tensor | None:
        """What is added to the loss, for a strength of 1; None without a regulariser."""
        return None

    def constrain(self) -> None:
        """Bring the gates back into their range after a step."""


class NaiveSoftThreshold(NaiveMask):
    """STR, eq. 3 (Kusupati et al. 2020)."""

    def forward(self, weight: Tensor) -> Tensor:
        """sign(w) relu(|w| - sigmoid(s))."""
        return torch.sign(weight) * torch.relu(weight.abs() - torch.sigmoid(self.gates))


class NaiveHardConcrete(NaiveMask):
    """L0, eq. 10 to 13 (Louizos et al. 2018)."""

    def forward(self, weight: Tensor) -> Tensor:
        """w z, with a random z in training."""
        s = torch.sigmoid(self.gates)
        if self.training:
            s = torch.sigmoid((_logistic_noise(self.gates) + self.gates) / BETA)
        return weight * torch.clamp(s * (ZETA - GAMMA) + GAMMA, 0, 1)

    def penalty(self) -> Tensor:
        """Expected number of weights that are not 0."""
        return torch.sigmoid(self.gates - BETA * math.log(-GAMMA / ZETA)).sum()

    @torch.no_grad()
    def constrain(self) -> None:
        """The authors' range."""
        self.gates.clamp_(math.log(1e-2), math.log(1e2))


class NaiveGumbelSoftmax(NaiveMask):
    """A choice between two with straight-through gradients (Jang et al. 2017, eq. 2).

    The difference of two Gumbel variables is a logistic one; drawing both would cost more.
    """

    temperature, scale = 1.0, 1.0

    def forward(self, weight: Tensor) -> Tensor:
        """w z with z of 0 and 1."""
        if not self.training:
            return weight * (self.gates > 0).to(weight.dtype)
        noise = _logistic_noise(self.gates)
        soft = torch.sigmoid((self.gates * self.scale + noise) / self.temperature)
        hard = (soft > 0.5).to(soft.dtype)
        return weight * (hard + (soft - soft.detach()))

    def penalty(self) -> Tensor:
        """Expected number of kept weights."""
        return torch.sigmoid(self.gates * self.scale).sum()


class NaiveTopScores(NaiveMask):
    """Movement, eq. 4 (Sanh et al. 2020); `choose` keeps the highest scores of all layers."""

    chosen: Tensor

    def __init__(self, gates: Tensor) -> None:
        super().__init__(gates)
        self.register_buffer("chosen", torch.ones_like(gates))

    def forward(self, weight: Tensor) -> Tensor:
        """w m, where the scores get the mask's gradient (straight-through)."""
        return weight * (self.chosen + (self.gates - self.gates.detach()))


class NaiveSoftScores(NaiveTopScores):
    """Soft movement: the same with a regulariser."""

    def penalty(self) -> Tensor:
        """sum of sigmoid(score)."""
        return torch.sigmoid(self.gates).sum()


class NaiveVariationalDropout(NaiveMask):
    """A layer with local reparameterisation in place of another (Molchanov et al. 2017)."""

    def __init__(self, gates: Tensor, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__(gates)
        self.weight, self.bias = layer.weight, layer.bias
        self.options: dict[str, Any] = {}
        if isinstance(layer, nn.Conv2d):
            self.options = {"stride": layer.stride, "padding": layer.padding}

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, in training with the noise of its weights."""
        log_alpha = self.log_alpha()
        weight = torch.where(log_alpha < 3.0, self.weight, 0.0)
        mean = self._product(x, weight, self.bias)
        if not self.training:
            return mean
        variance = self._product(x * x, torch.exp(log_alpha) * self.weight**2, None)
        return mean + torch.sqrt(variance + 1e-8) * torch.randn_like(mean)

    def log_alpha(self) -> Tensor:
        """log sigma^2 - log w^2, clipped."""
        return torch.clamp(self.gates - torch.log(self.weight**2 + 1e-8), -8.0, 8.0)

    def penalty(self) -> Tensor:
        """KL divergence, eq. 14."""
        log_alpha = self.log_alpha()
        fitted = K1 * torch.sigmoid(K2 + K3 * log_alpha)
        return -(fitted - 0.5 * torch.log1p(torch.exp(-log_alpha)) - K1).sum()

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.options:
            return F.conv2d(x, weight, bias, **self.options)
        return F.linear(x, weight, bias)


def wrap(model: nn.Module, kind: type[NaiveMask], gates: dict[str, Tensor]) -> list[NaiveMask]:
    """Mask the weights of a flat model; `gates` maps names of weights to the gates' start."""
    masks = []
    for name, start in gates.items():
        leaf = name.removesuffix(".weight")
        layer = model.get_submodule(leaf)
        if kind is NaiveVariationalDropout:
            assert isinstance(layer, nn.Linear | nn.Conv2d)
            mask: NaiveMask = NaiveVariationalDropout(start.clone(), layer)
            setattr(model, leaf, mask)
        else:
            mask = kind(start.clone())
            parametrize.register_parametrization(layer, "weight", mask)
        masks.append(mask)
    return masks


@torch.no_grad()
def choose(masks: Sequence[NaiveMask], keep: int) -> None:
    """Keep the `keep` highest scores of all layers together."""
    scores = torch.cat([mask.gates.flatten() for mask in masks])
    border = scores.kthvalue(scores.numel() - keep).values
    for mask in masks:
        assert isinstance(mask, NaiveTopScores)
        mask.chosen = (mask.gates > border).to(mask.gates.dtype)


def _logistic_noise(like: Tensor) -> Tensor:
    u = torch.rand_like(like).clamp(LEAST, 1 - LEAST)
    return torch.log(u) - torch.log(1 - u)
