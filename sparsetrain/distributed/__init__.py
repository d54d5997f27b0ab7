"""Training over several processes: whether masks agree, and what `fully_shard` does to a model."""

from sparsetrain.distributed.checks import check_masks

__all__ = ["check_masks"]
