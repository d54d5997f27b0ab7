"""Small data sets, reference networks and a fast training loop for demos and reference runs.

Nothing in the library depends on this package: it is the bench on which policies are tried out.
"""

from sparsetrain.workbench.data import DATASETS, Dataset, load
from sparsetrain.workbench.networks import NETWORKS, build
from sparsetrain.workbench.training import EpochRecord, History, Trainer, evaluate, fit

__all__ = [
    "DATASETS",
    "NETWORKS",
    "Dataset",
    "EpochRecord",
    "History",
    "Trainer",
    "build",
    "evaluate",
    "fit",
    "load",
]
