"""sparsetrain: declarative sparse training for PyTorch."""

from sparsetrain import cost, curvature, storage
from sparsetrain.allocation import (
    ErdosRenyi,
    ErdosRenyiKernel,
    Explicit,
    Global,
    Uniform,
    UniformFirstDense,
)
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
    SoftThreshold,
    Static,
    VariationalDropout,
)
from sparsetrain.pruning import PruneResult, owl, prune, sparsegpt
from sparsetrain.recipe import Recipe, Rule
from sparsetrain.report.events import LayerChange, UpdateEvent
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
    "ConstantFanIn",
    "DynamicNetworkSurgery",
    "ErdosRenyi",
    "ErdosRenyiKernel",
    "Explicit",
    "Fisher",
    "GateFisher",
    "Global",
    "GraSP",
    "Gradient",
    "Gradual",
    "GumbelSoftmax",
    "HardConcrete",
    "LayerChange",
    "Magnitude",
    "Momentum",
    "Movement",
    "MovementScore",
    "NMSparse",
    "OptimalBrainDamage",
    "Policy",
    "PruneResult",
    "Random",
    "Recipe",
    "RigL",
    "Rule",
    "Schedule",
    "Score",
    "SoftThreshold",
    "SparseOptimizer",
    "Static",
    "SynFlow",
    "Taylor",
    "Uniform",
    "UniformFirstDense",
    "Unstructured",
    "UpdateEvent",
    "UpdateSchedule",
    "VariationalDropout",
    "Wanda",
    "compress",
    "cost",
    "curvature",
    "owl",
    "prune",
    "score",
    "sparsegpt",
    "storage",
]
