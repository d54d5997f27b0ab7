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
    NMSparse,
    Policy,
    RigL,
    Static,
)
from sparsetrain.recipe import Recipe, Rule
from sparsetrain.report.events import LayerChange, UpdateEvent
from sparsetrain.schedules import Schedule, UpdateSchedule
from sparsetrain.scores import Gradient, Magnitude, Momentum, Random, Score, Taylor
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
    "LayerChange",
    "Magnitude",
    "Momentum",
    "NMSparse",
    "Policy",
    "Random",
    "Recipe",
    "RigL",
    "Rule",
    "Schedule",
    "Score",
    "SparseOptimizer",
    "Static",
    "Taylor",
    "Uniform",
    "UniformFirstDense",
    "Unstructured",
    "UpdateEvent",
    "UpdateSchedule",
    "compress",
    "cost",
    "storage",
]
