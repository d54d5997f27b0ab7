"""The diagonal of the generalized Gauss-Newton matrix."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparsetrain.batches import Adapter
from sparsetrain.curvature import roots
from sparsetrain.curvature.diagonals import (
    BUDGET,
    Diagonal,
    Method,
    Pass,
    mean_squares,
)
from sparsetrain.curvature.losses import LossFunction

Estimate = Literal["exact", "monte_carlo"]


def ggn_diagonal(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction,
    *,
    estimate: Estimate = "exact",
    probes: int = 1,
    parameters: Iterable[str] | None = None,
    method: Method = "auto",
    adapter: Adapter | None = None,
    seed: int = 0,
    budget: int = BUDGET,
    progress: bool = False,
) -> Diagonal:
    """The diagonal of the generalized Gauss-Newton matrix, the mean over samples of J' H J.

    J is the Jacobian of a sample's outputs, H the Hessian of its loss with respect to them
    (Schraudolph 2002, "Fast curvature matrix-vector products", section 3). It is the Hessian's
    diagonal where the outputs are piecewise linear in each single weight: ReLU, max-pooling and
    evaluation-mode batch normalisation, without attention, LayerNorm or weights used twice in
    depth. Elsewhere (tanh, GELU, attention) the two differ, and this one is never negative. The
    model is in evaluation mode meanwhile; `.grad` and everything else stay as they are.

    Args:
        batches: an iterable of (inputs, targets), or of what `adapter` makes that of.
        loss_fn: (outputs, targets) -> scalar, convex in the outputs; it is called for one sample at
            a time.
        estimate: "exact" takes a backward pass for each output (class); "monte_carlo" one for each
            probe, with random mixtures of the outputs, right on average.
        probes: of "monte_carlo".
        parameters: names; all that train when None.
        method: as for `fisher_diagonal`.
        seed: of the mixtures.
        budget: numbers that per-sample gradients may take at a time.
        progress: whether to show a bar.

    Returns:
        Parameter name -> tensor of the parameter's shape.

    Raises:
        ValueError: no batch, unknown names, or a loss that is not convex in the outputs.
        RuntimeError: torch.func cannot vectorise the model where it has to.
    """
    if probes < 1:
        raise ValueError(f"probes={probes} must be 1 or more")
    generator = torch.Generator().manual_seed(seed)
    share = probes**-0.5  # squares of the passes are added up

    def passes(outputs: Any, targets: Any) -> Iterator[Pass]:
        if estimate == "exact":
            for column in roots.columns(loss_fn, outputs, targets):
                yield Pass(_product, column)
        else:
            for _ in range(probes):
                yield Pass(_product, share * roots.mixture(loss_fn, outputs, targets, generator))

    means, samples = mean_squares(
        model,
        batches,
        passes,
        who="ggn_diagonal",
        parameters=parameters,
        method=method,
        adapter=adapter,
        budget=budget,
        progress=progress,
    )
    name = "GGN" if estimate == "exact" else f"GGN, Monte Carlo with {probes} probes"
    return Diagonal(means, name, samples)


def _product(outputs: Tensor, back: Tensor) -> Tensor:
    return (outputs * back).sum()
