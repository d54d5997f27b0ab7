"""Choosing inputs of a layer so that its outputs change least, and fitting what is left.

Plain functions on matrices; the methods in `rebuilding.py` are made of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

_LEAST = 1e-6  # of the largest variance


def greedy_discard(contributions: Tensor, count: int) -> list[int]:
    """The inputs whose sum is smallest, taken one after the other.

    Luo et al. 2017, "ThiNet", algorithm 1: of all inputs the one is added to the discarded set
    that makes the norm of the set's sum over the rows least.

    Args:
        contributions: [rows, inputs].
        count: how many to discard.

    Returns:
        In the order of their removal.
    """
    gram = contributions.double().T @ contributions.double()
    own, together = gram.diagonal(), torch.zeros_like(gram[0])
    taken: list[int] = []
    for _ in range(count):
        cost = own + 2 * together
        cost[taken] = torch.inf
        best = int(cost.argmin())
        taken.append(best)
        together = together + gram[best]
    return taken


def matching_pursuit(contributions: Tensor, target: Tensor, count: int) -> list[int]:
    """The inputs whose best mixture is nearest to a target, taken one after the other.

    Orthogonal matching pursuit: of all inputs the one is added that alone fits the residual best,
    then all are fitted anew.

    Args:
        contributions: [rows, inputs].
        target: [rows].
        count: how many to keep.

    Returns:
        In the order in which they are taken.
    """
    columns = contributions.double()
    gram, product = columns.T @ columns, columns.T @ target.double()
    squares = gram.diagonal().clamp_min(torch.finfo(torch.float64).tiny)
    taken: list[int] = []
    rest = product
    for _ in range(count):
        gain = rest.square() / squares
        gain[taken] = -1.0
        taken.append(int(gain.argmax()))
        rest = product - gram[:, taken] @ solved(gram[taken][:, taken], product[taken])
    return taken


def solved(gram: Tensor, product: Tensor) -> Tensor:
    """The least-squares solution of smallest norm; `gram` may be singular.

    Mixtures of inputs that hardly vary are left out. They say next to nothing, and would get
    weights so large that the network diverges when it trains on.
    """
    values, vectors = torch.linalg.eigh(gram)
    least = values[-1] * _LEAST
    inverse = torch.where(values > least, 1 / values.clamp_min(least), 0.0)
    inside = vectors.T @ product
    scaled = inverse * inside if inside.dim() == 1 else inverse.unsqueeze(1) * inside
    solution: Tensor = vectors @ scaled
    return solution


def least_squares(inputs: Tensor, outputs: Tensor, *, intercept: bool) -> tuple[Tensor, Tensor]:
    """Weights and bias of the linear map that is nearest to the outputs.

    Args:
        inputs: [rows, numbers].
        outputs: [rows, outputs].
        intercept: otherwise the bias is 0.

    Returns:
        [outputs, numbers] and [outputs].
    """
    x, y = inputs.double(), outputs.double()
    x_mean, y_mean = intercept * x.mean(0), intercept * y.mean(0)
    x, y = x - x_mean, y - y_mean
    weight = solved(x.T @ x, x.T @ y).T
    return weight.to(inputs.dtype), (y_mean - weight @ x_mean).to(inputs.dtype)


def lasso_path(
    contributions: Tensor, target: Tensor, count: int, *, seed: int, most: int = 20
) -> list[int]:
    """Exactly `count` inputs that LASSO gives coefficients to.

    He et al. 2017, "Channel pruning for accelerating very deep neural networks", section 3.1. The
    penalty is bisected between none and the one that lets no input in. Where no penalty in `most`
    steps gives the count, the largest coefficients of the nearest larger set are taken.

    Args:
        contributions: [rows, inputs].
        target: [rows].
        count: how many to keep.
        seed: of the order of coordinates.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import Lasso
    except ImportError as error:
        raise ImportError(
            "LASSO needs scikit-learn: pip install 'sparsetrain[channels]'"
        ) from error
    x, y = contributions.double().numpy(), target.double().numpy()
    x, y = x - x.mean(0), y - y.mean()
    # With the products at hand a sweep over the inputs takes no pass over the rows.
    model = Lasso(
        precompute=x.T @ x,
        fit_intercept=False,
        warm_start=True,
        selection="random",
        random_state=seed,
        max_iter=100_000,
    )
    enough = np.abs(x.T @ y) / len(x)  # by itself, before any is let in

    def found(penalty: float) -> Any:
        model.set_params(alpha=penalty)
        model.fit(x, y)
        return np.abs(model.coef_)

    low, high = 0.0, max(float(enough.max()), 1e-12)
    best = enough
    for _ in range(most):
        middle = (low + high) / 2
        size = found(middle)
        kept = int((size > 0).sum())
        if kept >= count:
            low, best = middle, size
        else:
            high = middle
        if kept == count:
            break
    return sorted(np.argsort(-best, kind="stable")[:count].tolist())
