"""What this process holds of a weight: all of it, or the rows that are its shard.

Policies, scores and storages work on the part that is here. What has to be known of the whole, a
count or a threshold, is added up through the part; for a weight that is whole nothing is sent.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter

Shape = tuple[int, ...]


class Part:
    """A whole weight, held by this process alone or by each of several alike.

    Attributes:
        shape: of the whole weight.
        held_shape: of what is here.
        rank: this process among those that share the weight.
        ranks: their number.
        first_row: of what is here, in dimension 0 of the whole.
        group: the process group of those that share the weight; None for a whole one.
    """

    is_whole: ClassVar[bool] = True

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.held_shape = shape
        self.rank, self.ranks, self.first_row = 0, 1, 0
        self.group: Any = None

    @property
    def held_numel(self) -> int:
        """Weights that are here."""
        return math.prod(self.held_shape)

    def held(self, tensor: Tensor) -> Tensor:
        """Of a tensor of the weight's shape, what is here, without its history; shares memory."""
        return tensor.detach()

    def wrap(self, held: Tensor) -> Tensor:
        """The tensor of the weight's shape of which each process has its `held`; shares memory.

        What a process has may be smaller than the weight in all dimensions but the first.
        """
        return held

    def sum(self, counts: Tensor) -> Tensor:
        """A CPU tensor, added up over the processes that share the weight."""
        return counts

    def lowest(self, value: float) -> float:
        """The smallest of the values that the processes give."""
        return value

    def totals(self, *counts: int) -> tuple[int, ...]:
        """Counts of what is here, added up."""
        return counts

    def place(self, count: int) -> tuple[int, int]:
        """How many of something the ranks before this one have, which has `count`, and all."""
        return 0, count


class ShardedPart(Part):
    """The rows of a sharded weight (a DTensor, as `fully_shard` makes) that this process holds.

    Rows are shared out as `torch.chunk` does, so shards may be uneven, and some empty. Over other
    dimensions of the mesh the weight may be replicated (hybrid sharding).
    """

    is_whole: ClassVar[bool] = False

    def __init__(self, name: str, tensor: Tensor) -> None:
        from torch.distributed.tensor import Replicate, Shard

        super().__init__(tuple(tensor.shape))
        self.mesh, self.placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
        plain = all(type(place) in (Shard, Replicate) for place in self.placements)
        sharded = [i for i, place in enumerate(self.placements) if place.is_shard()]
        if not plain or len(sharded) > 1 or any(self.placements[i].dim for i in sharded):
            raise ValueError(
                f"{name} is laid out over ranks as {self.placements}: masks follow weights that "
                "are sharded along dimension 0, as fully_shard does, and replicated otherwise"
            )
        if sharded:
            self.group = self.mesh.get_group(sharded[0])
            self.rank, self.ranks = self.mesh.get_local_rank(sharded[0]), self.mesh.size(sharded[0])
        rows = -(-self.shape[0] // self.ranks)
        self.first_row = min(self.rank * rows, self.shape[0])
        last_row = min(self.first_row + rows, self.shape[0])
        self.held_shape = (last_row - self.first_row, *self.shape[1:])

    def held(self, tensor: Tensor) -> Tensor:
        """The local shard; of a tensor that is whole here, the same rows."""
        if tensor.shape[0] != self.shape[0]:
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)} is not of the weight's rows")
        if not hasattr(tensor, "to_local"):
            return tensor.detach()[self.first_row : self.first_row + self.held_shape[0]]
        if tensor.placements != self.placements:  # type: ignore[attr-defined]
            tensor = tensor.redistribute(self.mesh, self.placements)  # type: ignore[attr-defined]
        with torch.no_grad():
            local: Tensor = tensor.to_local()
        return local

    def wrap(self, held: Tensor) -> Tensor:
        """A DTensor laid out as the weight is."""
        from torch.distributed.tensor import DTensor

        shape = torch.Size((self.shape[0], *held.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            held, self.mesh, self.placements, run_check=False, shape=shape, stride=stride
        )

    def sum(self, counts: Tensor) -> Tensor:
        """Added up by one all-reduce over the ranks that share the weight."""
        return self._reduced(counts, "SUM")

    def lowest(self, value: float) -> float:
        """By an all-reduce."""
        return float(self._reduced(torch.tensor([value], dtype=torch.float64), "MIN"))

    def totals(self, *counts: int) -> tuple[int, ...]:
        """Counts of what is here, added up."""
        return tuple(self.sum(torch.tensor(counts)).tolist())

    def place(self, count: int) -> tuple[int, int]:
        """By a sum over a vector with a place for each rank."""
        counts = torch.zeros(self.ranks, dtype=torch.int64)
        counts[self.rank] = count
        counts = self.sum(counts)
        return int(counts[: self.rank].sum()), int(counts.sum())

    def _reduced(self, values: Tensor, by: str) -> Tensor:
        import torch.distributed as dist

        if self.group is None:
            return values
        # NCCL adds up what is on its device and nothing else.
        there = values.to(self.mesh.device_type, copy=True)
        dist.all_reduce(there, getattr(dist.ReduceOp, by), group=self.group)
        return there.to(values.device)


def part_of(name: str, tensor: Tensor) -> Part:
    """What this process holds of a weight.

    Raises:
        ValueError: it is sharded in a way that masks cannot follow; the message names it.
    """
    if type(tensor) in (Tensor, Parameter) or not hasattr(tensor, "device_mesh"):
        return Part(tuple(tensor.shape))
    return ShardedPart(name, tensor)
