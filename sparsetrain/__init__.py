"""sparsetrain: declarative sparse training for PyTorch."""

from sparsetrain import cost, storage
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
from sparsetrain.recipe import Recipe, Rule
from sparsetrain.report.events import LayerChange, UpdateEvent
from sparsetrain.schedules import Schedule, UpdateSchedule
from sparsetrain.scores import (
    Gradient,
    Magnitude,
    Momentum,
    MovementScore,
    Random,
    Score,
    Taylor,
)
from sparsetrain.storage import compress
from sparsetrain.structures import NM, Block, ConstantFanIn, Unstructured

__version__ = "0.1.0"

__all__ = [
    "NM",
    "SET",
    "SNFS",
    "Block",
    "ConstantFanIn",
    "DynamicNetworkSurgery",
    "ErdosRenyi",
    "ErdosRenyiKernel",
    "Explicit",
    "Global",
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
    "Policy",
    "Random",
    "Recipe",
    "RigL",
    "Rule",
    "Schedule",
    "Score",
    "SoftThreshold",
    "SparseOptimizer",
    "Static",
    "Taylor",
    "Uniform",
    "UniformFirstDense",
    "Unstructured",
    "UpdateEvent",
    "UpdateSchedule",
    "VariationalDropout",
    "compress",
    "cost",
    "storage",
]
