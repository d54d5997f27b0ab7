"""Curvature of the loss: per-sample gradients, and diagonals of Fisher, GGN and Hessian."""

from sparsetrain.curvature.diagonals import Diagonal
from sparsetrain.curvature.fisher import (
    fisher_diagonal,
    iterate_per_sample_gradients,
    per_sample_gradients,
)
from sparsetrain.curvature.ggn import ggn_diagonal
from sparsetrain.curvature.hessian import hessian_diagonal
from sparsetrain.curvature.inverse import inverse_fisher_blocks

__all__ = [
    "Diagonal",
    "fisher_diagonal",
    "ggn_diagonal",
    "hessian_diagonal",
    "inverse_fisher_blocks",
    "iterate_per_sample_gradients",
    "per_sample_gradients",
]
