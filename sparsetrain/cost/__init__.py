"""What a network costs."""

from sparsetrain.cost.energy import EnergyReport, energy, energy_of
from sparsetrain.cost.flops import FlopsReport, TrainingFlops, flops, training_flops
from sparsetrain.cost.hardware import Hardware
from sparsetrain.cost.latency import latency
from sparsetrain.cost.rapl import MeasuredEnergy, measured_energy

__all__ = [
    "EnergyReport",
    "FlopsReport",
    "Hardware",
    "MeasuredEnergy",
    "TrainingFlops",
    "energy",
    "energy_of",
    "flops",
    "latency",
    "measured_energy",
    "training_flops",
]
