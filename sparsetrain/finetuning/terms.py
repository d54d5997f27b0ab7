"""How far a student is from its teacher: one function a term of the distillation loss.

Masks are [samples, tokens], non-zero where a token counts, or None.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def logit_divergence(
    student: Tensor, teacher: Tensor, temperature: float, mask: Tensor | None = None
) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), mean over samples and positions.

    Hinton, Vinyals & Dean 2015, "Distilling the knowledge in a neural network", section 2; the
    entropy of the teacher is taken off, so that equal logits give 0.

    Args:
        student: logits [samples, ..., classes].
        teacher: of the same shape.
    """
    own = F.log_softmax(student / temperature, -1)
    taught = F.log_softmax(teacher / temperature, -1)
    divergence = F.kl_div(own, taught, reduction="none", log_target=True).sum(-1)
    return temperature**2 * _mean(divergence, mask)


def hidden_error(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of squared differences (Romero et al. 2015, "FitNets", equation 3, without its 1/2).

    Args:
        student: [samples, ...]; [samples, tokens, features] where a mask is to count.
        teacher: of the same shape.
    """
    squares = (student - teacher).square()
    return _mean(squares.mean(-1), mask)


def map_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of attention maps, mean over samples.

    Zagoruyko & Komodakis 2017, "Paying more attention to attention", equation 2, without beta / 2;
    the norm is squared, as in the authors' code.

    Args:
        student: [samples, positions], from `activation_map`.
        teacher: of the same shape.
    """
    return (student - teacher).square().sum(1).mean()


def activation_map(output: Tensor, channels: int, mask: Tensor | None = None) -> Tensor:
    """Squares added up over channels, of length 1 for each sample (the same paper, section 3.1).

    Args:
        output: [samples, channels, height, width], or with other positions.
        channels: the dimension of channels.

    Returns:
        [samples, positions]
    """
    energy = output.square().sum(channels).flatten(1)
    if mask is not None:
        energy = energy * _counts(energy, mask)
    return F.normalize(energy, dim=1)


def probability_divergence(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """KL(teacher || student) of attention probabilities, mean over heads and queries.

    Wang et al. 2020, "MiniLM", section 3.1. Where heads were removed, what is compared is the mean
    over heads.

    Args:
        student: [samples, heads, queries, keys].
        teacher: the same, with any number of heads.
    """
    if student.shape[1] != teacher.shape[1]:
        student, teacher = student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)
    # Probabilities are 0 where a mask forbids a key, or dropout has struck.
    least = torch.finfo(student.dtype).tiny
    logs = student.clamp_min(least).log(), teacher.clamp_min(least).log()
    divergence = (teacher * (logs[1] - logs[0])).sum(-1).mean(1)
    return _mean(divergence, mask)


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Over samples and positions; over tokens that count, where values are [samples, tokens]."""
    if mask is None or values.dim() != 2:
        return values.mean()
    counts = _counts(values, mask)
    return (values * counts).sum() / counts.sum().clamp_min(1)


def _counts(values: Tensor, mask: Tensor) -> Tensor:
    """1 where a token counts, 0 elsewhere."""
    if mask.shape != values.shape:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}, and there are {tuple(values.shape)} samples and "
            "tokens: give one of that shape"
        )
    return (mask != 0).to(values.dtype)
