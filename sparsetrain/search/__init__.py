"""Choosing where to be sparse: a ratio for each layer, searched for."""

from typing import Any

from sparsetrain.search.amc import AmcResult, amc
from sparsetrain.search.budget import dynamic_program
from sparsetrain.search.channels import Channels
from sparsetrain.search.evaluations import Evaluated, Evaluations
from sparsetrain.search.fitting import fitted
from sparsetrain.search.knobs import ByFunction, CostOf, Knob, Knobs, Pruning
from sparsetrain.search.max_sparsity import MaxSparsity, max_sparsity
from sparsetrain.search.points import Point, SearchResult, recipe_of
from sparsetrain.search.ratios import ratios
from sparsetrain.search.sensitivity import Sensitivity, sensitivity
from sparsetrain.search.weights import Weights

__all__ = [
    "AmcResult",
    "ByFunction",
    "Channels",
    "CostOf",
    "Evaluated",
    "Evaluations",
    "Knob",
    "Knobs",
    "MaxSparsity",
    "Point",
    "Pruning",
    "SearchResult",
    "Sensitivity",
    "Weights",
    "amc",
    "dynamic_program",
    "fitted",
    "max_sparsity",
    "ratios",
    "recipe_of",
    "sensitivity",
]


def __getattr__(name: str) -> Any:
    """`AmcEnvironment` is a class of Gymnasium's, which may be missing."""
    if name != "AmcEnvironment":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sparsetrain.search.amc_environment import AmcEnvironment

    return AmcEnvironment
