"""Pruning of networks as they are: what to keep, and how to go on training it."""

from sparsetrain.pruning.one_shot import prune
from sparsetrain.pruning.owl import owl
from sparsetrain.pruning.result import PruneResult
from sparsetrain.pruning.sparse_gpt import sparsegpt

__all__ = ["PruneResult", "owl", "prune", "sparsegpt"]
