"""Choosing where to be sparse: a ratio for each layer, searched for."""

from sparsetrain.search.channels import Channels
from sparsetrain.search.knobs import ByFunction, Knobs, Pruning
from sparsetrain.search.weights import Weights

__all__ = ["ByFunction", "Channels", "Knobs", "Pruning", "Weights"]
