"""sparsetrain: declarative sparse training for PyTorch."""

import importlib
from typing import Any

from sparsetrain import channels, cost, curvature, distributed, integrations, search, storage
from sparsetrain.allocation import (
    ErdosRenyi,
    ErdosRenyiKernel,
    Explicit,
    Global,
    Uniform,
    UniformFirstDense,
)
from sparsetrain.cost.targets import (
    CompressionRate,
    CostTarget,
    Energy,
    Flops,
    Latency,
    ModelBytes,
    Parameters,
)
from sparsetrain.exporting import OnnxResult, export_onnx
from sparsetrain.finetuning import Distillation, Finetune, distill
from sparsetrain.master_weights import MasterWeights
from sparsetrain.optimizer import SparseOptimizer
from sparsetrain.policies import (
    SET,
    SNFS,
    DynamicNetworkSurgery,
    Gradual,
    GumbelSoftmax,
    HardConcrete,
    Movement,
    NMSparse,
    Policy,
    RigL,
    Slimming,
    SoftThreshold,
    Static,
    VariationalDropout,
)
from sparsetrain.pruning import (
    IterativeResult,
    PruneResult,
    Snapshot,
    TrainingRun,
    optimal_brain_surgeon,
    owl,
    prune,
    prune_iteratively,
    rewind,
    sparsegpt,
)
from sparsetrain.recipe import Recipe, Rule
from sparsetrain.report.events import LayerChange, UpdateEvent
from sparsetrain.report.logging import log_updates
from sparsetrain.schedules import Schedule, UpdateSchedule
from sparsetrain.scores import (
    SNIP,
    ActivationMagnitude,
    ActivationVariance,
    BatchNormScale,
    Fisher,
    GateFisher,
    Gradient,
    GraSP,
    Magnitude,
    Momentum,
    MovementScore,
    OptimalBrainDamage,
    OptimalBrainSurgeon,
    Random,
    Score,
    SynFlow,
    Taylor,
    Wanda,
)
from sparsetrain.scoring import score
from sparsetrain.storage import compress
from sparsetrain.structures import NM, Block, ConstantFanIn, Unstructured

__version__ = "0.1.0"

__all__ = [
    "NM",
    "SET",
    "SNFS",
    "SNIP",
    "ActivationMagnitude",
    "ActivationVariance",
    "BatchNormScale",
    "Block",
    "CompressionRate",
    "ConstantFanIn",
    "CostTarget",
    "Distillation",
    "DynamicNetworkSurgery",
    "Energy",
    "ErdosRenyi",
    "ErdosRenyiKernel",
    "Explicit",
    "Finetune",
    "Fisher",
    "Flops",
    "GateFisher",
    "Global",
    "GraSP",
    "Gradient",
    "Gradual",
    "GumbelSoftmax",
    "HardConcrete",
    "IterativeResult",
    "Latency",
    "LayerChange",
    "Magnitude",
    "MasterWeights",
    "ModelBytes",
    "Momentum",
    "Movement",
    "MovementScore",
    "NMSparse",
    "OnnxResult",
    "OptimalBrainDamage",
    "OptimalBrainSurgeon",
    "Parameters",
    "Policy",
    "PruneResult",
    "Random",
    "Recipe",
    "RigL",
    "Rule",
    "Schedule",
    "Score",
    "Slimming",
    "Snapshot",
    "SoftThreshold",
    "SparseOptimizer",
    "Static",
    "SynFlow",
    "Taylor",
    "TrainingRun",
    "Uniform",
    "UniformFirstDense",
    "Unstructured",
    "UpdateEvent",
    "UpdateSchedule",
    "VariationalDropout",
    "Wanda",
    "channels",
    "compress",
    "cost",
    "curvature",
    "distill",
    "distributed",
    "export_onnx",
    "integrations",
    "log_updates",
    "optimal_brain_surgeon",
    "owl",
    "prune",
    "prune_iteratively",
    "rewind",
    "score",
    "search",
    "sparsegpt",
    "storage",
]


def __getattr__(name: str) -> Any:
    if name == "testing":  # whoever tests nothing need not load it
        return importlib.import_module("sparsetrain.testing")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
