"""What a network costs."""

from sparsetrain.cost.energy import EnergyReport, energy, energy_of
from sparsetrain.cost.flops import FlopsReport, TrainingFlops, flops, training_flops
from sparsetrain.cost.hardware import Hardware
from sparsetrain.cost.latency import latency
from sparsetrain.cost.latency_table import LatencyTable, latency_table
from sparsetrain.cost.rapl import MeasuredEnergy, measured_energy

__all__ = [
    "EnergyReport",
    "FlopsReport",
    "Hardware",
    "LatencyTable",
    "MeasuredEnergy",
    "TrainingFlops",
    "energy",
    "energy_of",
    "flops",
    "latency",
    "latency_table",
    "measured_energy",
    "training_flops",
]
