"""Pruning of networks as they are: what to keep, and how to go on training it."""

from sparsetrain.pruning.one_shot import prune
from sparsetrain.pruning.result import PruneResult

__all__ = ["PruneResult", "prune"]
