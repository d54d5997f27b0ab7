"""Pruning of networks as they are: what to keep, and how to go on training it."""

from sparsetrain.pruning.iterative import prune_iteratively
from sparsetrain.pruning.one_shot import prune
from sparsetrain.pruning.optimal_brain_surgeon import optimal_brain_surgeon
from sparsetrain.pruning.owl import owl
from sparsetrain.pruning.result import PruneResult
from sparsetrain.pruning.rewinding import Snapshot, rewind
from sparsetrain.pruning.rounds import IterativeResult, TrainedRound
from sparsetrain.pruning.sparse_gpt import sparsegpt
from sparsetrain.pruning.training_run import TrainingRun

__all__ = [
    "IterativeResult",
    "PruneResult",
    "Snapshot",
    "TrainedRound",
    "TrainingRun",
    "optimal_brain_surgeon",
    "owl",
    "prune",
    "prune_iteratively",
    "rewind",
    "sparsegpt",
]
