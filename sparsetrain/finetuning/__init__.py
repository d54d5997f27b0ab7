"""Training on after pruning: distillation from the dense network, and learning rates."""

from sparsetrain.finetuning.distillation import Distillation, distill
from sparsetrain.finetuning.finetune import Finetune

__all__ = ["Distillation", "Finetune", "distill"]
