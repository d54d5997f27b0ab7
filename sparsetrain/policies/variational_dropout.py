"""Sparse variational dropout (Molchanov et al. 2017)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from sparsetrain.candidates import Candidate
from sparsetrain.learned.base import gates_like
from sparsetrain.learned.sharing import share
from sparsetrain.learned.variational_dropout import VariationalDropoutMask
from sparsetrain.policies.control import Budget, Steering
from sparsetrain.policies.learned import LearnedPolicy

#: Power of the curve along which the logarithm of the density falls.
_EARLY = 6


class VariationalDropout(LearnedPolicy):
    """Gaussian noise on every weight; those that drown in it are dropped (Molchanov et al. 2017).

    log alpha = log sigma^2 - log w^2; a weight is dropped at log alpha >= `threshold`. The
    regulariser is the KL divergence from a log-uniform prior, eq. 14. Its `strength` is 1 over the
    number of training examples in the paper, when the loss is a mean over examples.
    """

    kind: Literal["variational_dropout"] = "variational_dropout"
    # The KL divergence acts slowly; what has grown under too much of it would stay noisy for long.
    steering: ClassVar[Steering] = Steering(start=1.0, gain=20.0, damping=2.0)

    threshold: float = Field(3.0, gt=-8, lt=8, description="of log alpha")
    log_sigma2: float = Field(-10.0, description="log sigma^2 at the start")
    warm_up: float = Field(
        0.1,
        ge=0,
        le=1,
        description="share of total_steps over which `strength` rises from 0, after update.start; "
        "without it all weights are dropped before any has learned",
    )
    local: bool = Field(
        True,
        description="noise on activations instead of weights (local reparameterisation), for "
        "Linear and Conv layers; other layers get it on the weights",
    )
    clip: bool = Field(
        True, description="leave out dropped weights in training passes too, as the authors' code"
    )

    def _default_lr(self, options: dict[str, Any]) -> float:
        """The weights' own, as in the authors' code: noise that outruns the means harms them."""
        return float(options.get("initial_lr", options["lr"]))

    def wanted(self, budget: Budget, step: int) -> float:
        """Most weights go early, as they do at a constant strength: noise keeps weights that have
        not grown from growing, while those that have are held by their gradients."""
        share = 1 - (1 - self.progress(step)) ** _EARLY
        density: float = (budget.keep / budget.numel) ** share
        return budget.numel * density

    def learned_mask(
        self, candidate: Candidate, generator: torch.Generator
    ) -> VariationalDropoutMask:
        """log sigma^2 for each weight."""
        weight = candidate.param.detach()
        return VariationalDropoutMask(
            share("weight", tuple(weight.shape)),
            gates_like(weight, torch.full(weight.shape, self.log_sigma2)),
            threshold=self.threshold,
            local=self.local and candidate.runs_forward and not candidate.is_transposed,
            clip=self.clip,
        )
