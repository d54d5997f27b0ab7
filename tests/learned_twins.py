"""Learned masks as their papers write them: in float64, with plain autograd and plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import combinations, product

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sparsetrain.learned import LearnedMask

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1


def numbers(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    """Normal numbers in float64, always the same, apart from torch's global random source."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator) * scale


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """The global random source at a seed, and afterwards as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def output(mask: LearnedMask, weight: Tensor, **gates: Tensor) -> Tensor:
    """The weight behind the mask, with these tensors as its gates and always the same noise."""
    with seeded():
        return functional_call(mask, gates, (weight,))


def gradients(function: Callable[..., Tensor], *arguments: Tensor) -> list[Tensor]:
    """Of a fixed linear function of the result, so that no entry of it is left out."""
    leaves = [argument.detach().clone().requires_grad_() for argument in arguments]
    result = function(*leaves)
    return list(torch.autograd.grad((result * numbers(99, *result.shape)).sum(), leaves))


# Sharing.


def gate_numbers(per: str | tuple[int, int], shape: tuple[int, ...], transposed: bool) -> Tensor:
    """For each weight, the number of its gate; a pair stands for the size of blocks."""
    result = torch.empty(shape, dtype=torch.int64)
    columns = math.prod(shape[1:])
    for flat, index in enumerate(product(*map(range, shape))):
        if isinstance(per, tuple):
            row, column = index[0] // per[0], flat % columns // per[1]
            result[index] = row * (columns // per[1]) + column
        elif per == "weight":
            result[index] = flat
        else:
            outputs, inputs = (1, 0) if transposed else (0, 1)
            result[index] = index[outputs if per == "output" else inputs]
    return result


# Kusupati et al. 2020, equation 3.


def soft_threshold(weight: Tensor, s: Tensor, curve: str) -> Tensor:
    threshold = 1 / (1 + torch.exp(-s)) if curve == "sigmoid" else torch.exp(s)
    return torch.sign(weight) * torch.relu(weight.abs() - threshold)


# Louizos et al. 2018, equations 10 to 13.


def hard_concrete(log_alpha: Tensor, u: Tensor) -> Tensor:
    s = torch.sigmoid((u.log() - (1 - u).log() + log_alpha) / BETA)
    stretched = s * (ZETA - GAMMA) + GAMMA
    return torch.minimum(torch.ones_like(s), torch.maximum(torch.zeros_like(s), stretched))


def evaluation_gate(log_alpha: Tensor) -> Tensor:
    stretched = torch.sigmoid(log_alpha) * (ZETA - GAMMA) + GAMMA
    return torch.minimum(torch.ones_like(stretched), torch.relu(stretched))


def probability_open(log_alpha: Tensor) -> Tensor:
    return torch.sigmoid(log_alpha - BETA * math.log(-GAMMA / ZETA))


def midpoints(count: int) -> Tensor:
    """Where to evaluate a function of u for its mean over uniform u."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


# Jang et al. 2017, equations 1 and 2.


def gumbel_softmax(logits: Tensor, u: Tensor, temperature: float) -> Tensor:
    noisy = torch.exp((logits - torch.log(-torch.log(u))) / temperature)
    return noisy / noisy.sum(-1, keepdim=True)


def n_m_weight(weight: Tensor, shares: Tensor, n: int, m: int) -> Tensor:
    """Each weight times the summed shares [groups, C(m, n)] of the patterns that keep it.

    Groups of m consecutive inputs are counted by output, then input, then kernel position.
    """
    table = list(combinations(range(m), n))
    matrix = weight.flatten(2) if weight.dim() > 2 else weight.unsqueeze(2)
    outputs, inputs, places = matrix.shape
    result = torch.zeros_like(matrix)
    for o, i, r in product(range(outputs), range(inputs), range(places)):
        group = (o * (inputs // m) + i // m) * places + r
        kept = [number for number, pattern in enumerate(table) if i % m in pattern]
        result[o, i, r] = matrix[o, i, r] * shares[group, kept].sum()
    return result.view(weight.shape)


# Molchanov et al. 2017, equations 14 and 17, and Kingma et al. 2015.


def log_alpha_of(weight: Tensor, log_sigma2: Tensor) -> Tensor:
    return (log_sigma2 - (weight**2).log()).clamp(-8, 8)


def noise_variance(weight: Tensor, log_sigma2: Tensor) -> Tensor:
    return torch.exp(log_alpha_of(weight, log_sigma2)) * weight**2


def approximate_kl(log_alpha: Tensor) -> Tensor:
    k1, k2, k3 = 0.63576, 1.87320, 1.48695
    negative = k1 * torch.sigmoid(k2 + k3 * log_alpha) - 0.5 * torch.log1p(torch.exp(-log_alpha))
    return k1 - negative


def mean_log_magnitude(center: Tensor) -> Tensor:
    """E log|x| for x normal around `center` with variance 1, by the trapezoid rule in log|x|."""
    step = 1e-3
    t = torch.arange(-40, 6, step, dtype=torch.float64)
    x, mean = torch.exp(t), center.unsqueeze(-1)
    density = torch.exp(-((x - mean) ** 2) / 2) + torch.exp(-((x + mean) ** 2) / 2)
    return (density * t * x).sum(-1) * step / math.sqrt(2 * math.pi)


def exact_kl(log_alpha: Tensor) -> Tensor:
    """E log|1 + sqrt(alpha) eps| - 0.5 log alpha - C, with C so that it vanishes at infinity."""
    return mean_log_magnitude(torch.exp(-log_alpha / 2)) - mean_log_magnitude(torch.zeros(1))


def noisy_layer(
    layer: nn.Module, x: Tensor, mean: Tensor, variance: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and variance of a layer's output whose weights are independent normal variables."""

    def of_weight(weight: Tensor) -> Tensor:
        return functional_call(layer, {"weight": weight}, (x,))

    slopes = torch.autograd.functional.jacobian(of_weight, mean).flatten(x.dim())
    return of_weight(mean), slopes.square() @ variance.flatten()


# Sanh et al. 2020, equations 3 and 4.


def masked_by_scores(weight: Tensor, scores: Tensor, kept: Tensor, number: Tensor) -> Tensor:
    """The mask is a step function forwards and the identity backwards."""
    score = scores.flatten()[number]
    return weight * (kept.flatten()[number].to(weight.dtype) + score - score.detach())
