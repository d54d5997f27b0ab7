"""Curvature of the loss: per-sample gradients, and diagonals of Fisher, GGN and Hessian."""

from sparsetrain.curvature.diagonals import Diagonal
from sparsetrain.curvature.fisher import fisher_diagonal, per_sample_gradients

__all__ = ["Diagonal", "fisher_diagonal", "per_sample_gradients"]
