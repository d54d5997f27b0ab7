"""What a network costs."""

from sparsetrain.cost.flops import FlopsReport, TrainingFlops, flops, training_flops

__all__ = ["FlopsReport", "TrainingFlops", "flops", "training_flops"]
