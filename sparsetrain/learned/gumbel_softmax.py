"""Masks drawn with the Gumbel-softmax trick (Jang et al. 2017; Maddison et al. 2017)."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from sparsetrain.learned.base import LearnedMask, MaskFunction, accumulate, put, where_positive
from sparsetrain.learned.hard_concrete import logistic_noise
from sparsetrain.learned.sharing import Sharing
from sparsetrain.structures import NM

_LEAST_UNIFORM = 1e-10
_HIGHEST_ODDS = 6.0


class _Annealed(LearnedMask):
    """A mask whose choices harden; temperature and scale follow from the optimizer's clock.

    Attributes:
        temperature: tau, what logits and noise are divided by.
        scale: kappa, what logits are multiplied with before the noise is added.
    """

    temperature: Tensor
    scale: Tensor

    def __init__(self, sharing: Sharing, *, hard: bool, like: Tensor) -> None:
        super().__init__(sharing)
        self.hard = hard
        one = torch.ones((), dtype=like.dtype, device=like.device)
        self.register_buffer("temperature", one, persistent=False)
        self.register_buffer("scale", one.clone(), persistent=False)


class GumbelSoftmaxMask(_Annealed):
    """Keep or drop, for each gate: two logits with Gumbel noise, of which the difference matters.

    Args:
        sharing: which weights share a gate.
        logit: log-odds of keeping, of the gates' shape.
        hard: whether training passes use masks of 0 and 1 and the gradient of the soft ones
            (straight-through), or the soft ones themselves.
    """

    def __init__(self, sharing: Sharing, logit: Tensor, *, hard: bool = True) -> None:
        super().__init__(sharing, hard=hard, like=logit)
        self.logit = Parameter(logit)

    def sampled(self, weight: Tensor) -> Tensor:
        """With a random mask."""
        noise = logistic_noise(self.logit, self.logit.shape)
        logit = self.logit * self.scale
        gates: Tensor = _Choice.apply(logit, noise, self.temperature, self.hard)  # type: ignore[no-untyped-call]
        return self.sharing.times(weight, gates)

    def evaluated(self, weight: Tensor) -> Tensor:
        """With the more probable choice."""
        return self.sharing.times(weight, where_positive(self.logit.detach().clone()))

    def mask(self, weight: Tensor) -> Tensor:
        """Where keeping is the more probable choice."""
        return self.sharing.spread(self.logit > 0)

    def penalty(self, weight: Tensor) -> Tensor:
        """The expected number of kept weights."""
        return torch.sigmoid(self.logit * self.scale).sum() * self.sharing.size

    def add_penalty_gradient(self, weight: Parameter, strength: float) -> None:
        """In closed form."""
        kept = torch.sigmoid(self.logit.detach() * self.scale)
        slope = kept.sub_(kept * kept).mul_(self.scale)
        accumulate(self.logit, slope, strength * self.sharing.size)

    def constrain(self) -> None:
        """Log-odds of at most 6, beyond which a gate has hardly any gradient to come back by."""
        bound = _HIGHEST_ODDS / self.scale
        self.logit.data.clamp_(-bound, bound)

    def margins(self, weight: Tensor) -> Tensor:
        """The logits themselves."""
        return self.logit.detach()

    def put_across(self, weight: Tensor, gates: Tensor, *, keep: bool) -> None:
        """By logit."""
        put(self.logit, gates, 0.0, above=keep)


class _Choice(MaskFunction):
    """sigmoid((logit + noise) / temperature), or its hard version with the soft gradient."""

    @staticmethod
    def forward(logit: Tensor, noise: Tensor, temperature: Tensor, hard: bool) -> Tensor:
        noisy = logit + noise
        return where_positive(noisy) if hard else torch.sigmoid(noisy / temperature)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        logit, noise, temperature = ctx.saved_tensors
        soft = torch.sigmoid((logit + noise) / temperature)
        return grad * (soft - soft * soft) / temperature, None, None, None


class PatternMask(_Annealed):
    """One of the C(m, n) patterns for every group of m inputs (Fang et al. 2024, MaskLLM).

    Args:
        structure: n and m.
        shape: of the weight.
        logits: [groups, C(m, n)].
        hard: as in `GumbelSoftmaxMask`.
    """

    has_penalty = False
    patterns: Tensor

    def __init__(
        self, structure: NM, sharing: Sharing, logits: Tensor, *, hard: bool = True
    ) -> None:
        super().__init__(sharing, hard=hard, like=logits)
        self.structure = structure
        self.logits = Parameter(logits)
        self.register_buffer("patterns", patterns(structure).to(logits), persistent=False)

    def sampled(self, weight: Tensor) -> Tensor:
        """With a random pattern in every group."""
        uniform = torch.rand_like(self.logits).clamp_min(_LEAST_UNIFORM)
        gumbel = -torch.log(-torch.log(uniform))
        soft = torch.softmax((self.logits * self.scale + gumbel) / self.temperature, dim=-1)
        chosen = soft
        if self.hard:
            one = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
            chosen = one + soft - soft.detach()
        return weight * self.structure.expand(chosen @ self.patterns, tuple(weight.shape))

    def evaluated(self, weight: Tensor) -> Tensor:
        """With the most probable pattern in every group."""
        return weight * self.mask(weight)

    def mask(self, weight: Tensor) -> Tensor:
        """n True in every group of m."""
        chosen = self.patterns[self.logits.argmax(-1)] > 0
        return self.sharing.cut(self.structure.expand(chosen, self.sharing.shape))


def patterns(structure: NM) -> Tensor:
    """[C(m, n), m]: every way to keep n of m."""
    table = torch.zeros(0, structure.m)
    rows = []
    for kept in combinations(range(structure.m), structure.n):
        row = table.new_zeros(structure.m)
        row[list(kept)] = 1.0
        rows.append(row)
    return torch.stack(rows)
