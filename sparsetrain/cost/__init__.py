"""What a network costs."""

from sparsetrain.cost.flops import FlopsReport, TrainingFlops, flops, training_flops
from sparsetrain.cost.latency import latency

__all__ = ["FlopsReport", "TrainingFlops", "flops", "latency", "training_flops"]
