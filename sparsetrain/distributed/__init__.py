"""Training over several processes: what each holds of a weight, and whether their masks agree."""

from sparsetrain.distributed.part import Part, part_of

__all__ = ["Part", "part_of"]
