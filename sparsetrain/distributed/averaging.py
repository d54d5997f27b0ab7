"""Processes that each look at a slice of the data, and what they add up to know of all of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

Item = TypeVar("Item")


@dataclass(frozen=True)
class Ranks:
    """The processes among which the data are shared out; by default this one alone.

    Every method but `of` is a collective: all ranks call it, in the same order.

    Attributes:
        groups: process groups; sums over each of them in turn are sums over all ranks.
        size: number of ranks.
        device: where what is sent has to be.
        is_sharded: whether `fully_shard` has shared out the weights, too, so that a pass through
            the model is a collective and gradients come back as means over ranks.
    """

    groups: tuple[Any, ...] = ()
    size: int = 1
    device: torch.device | None = None
    is_sharded: bool = False

    @classmethod
    def of(cls, model: nn.Module) -> Ranks:
        """Those that a model under `DistributedDataParallel` or `fully_shard` is trained by.

        Raises:
            ValueError: parts of the model are sharded over different meshes.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        for module in model.modules():
            if isinstance(module, nn.parallel.DistributedDataParallel):
                group = module.process_group
                device = next(module.parameters()).device
                return cls((group,), dist.get_world_size(group), device)
        return cls._of_shards(model)

    @classmethod
    def _of_shards(cls, model: nn.Module) -> Ranks:
        if not _sharding_modules(model):
            return cls()
        reshard(model)
        params = model.parameters()
        meshes = [p.device_mesh for p in params if hasattr(p, "device_mesh")]
        first = meshes[0]
        if any(mesh != first for mesh in meshes):
            raise ValueError(
                "parts of the model are sharded over different meshes, so that no mean over ranks "
                "is known: score it before fully_shard"
            )
        groups = tuple(first.get_group(dim) for dim in range(first.ndim))
        return cls(groups, math.prod(first.shape), torch.device(first.device_type), True)

    def sum(self, values: Tensor) -> Tensor:
        """A tensor that every rank has a part of, added up."""
        if not self.groups:
            return values
        there = values.to(self.device, copy=True).contiguous()
        for group in self.groups:
            dist.all_reduce(there, group=group)
        return there.to(values.device)

    def totals(self, *counts: int) -> tuple[int, ...]:
        """Counts, added up."""
        return tuple(self.sum(torch.tensor(counts, dtype=torch.int64)).tolist())

    def mean(self, means: Mapping[str, Tensor], samples: int) -> dict[str, Tensor]:
        """Means over this rank's samples as means over the samples of all."""
        if not self.groups:
            return dict(means)
        (total,) = self.totals(samples)
        return {name: self.sum(value * samples) / total for name, value in means.items()}

    def sum_of_gradients(self, gradient: Tensor) -> Tensor:
        """The gradient of a sum over this rank's samples as that of the sum over all samples."""
        if hasattr(gradient, "device_mesh"):
            return gradient * self.size  # `fully_shard` has taken the mean over ranks already
        return self.sum(gradient)

    def seen_by(self, names: Sequence[str], seen: Iterable[str], *, every: bool) -> set[str]:
        """Of these names those that any rank, or every rank, has seen."""
        known = set(seen)
        if not self.groups:
            return known
        least = self.size if every else 1
        counts = self.totals(*(name in known for name in names))
        return {name for name, count in zip(names, counts, strict=True) if count >= least}

    def in_step(self, items: Iterable[Item], who: str) -> Iterator[Item]:
        """Items, as many on every rank.

        Raises:
            ValueError: one rank has more than another, on all of them.
        """
        iterator = iter(items)
        while True:
            item = next(iterator, None)
            (have,) = self.totals(item is not None)
            if have not in (0, self.size):
                raise ValueError(f"{who} needs equally many batches on every rank")
            if item is None:
                return
            yield item


def reshard(model: nn.Module) -> None:
    """Put the shards into the modules of which `fully_shard` has left whole weights there.

    After a forward pass it leaves those of the outermost module, until the next backward pass.
    """
    for module in _sharding_modules(model):
        module.reshard()


@contextmanager
def gradients_aside(parameters: Iterable[Parameter]) -> Iterator[None]:
    """No parameter has a gradient; each has its own again at the end."""
    before = [(parameter, parameter.grad) for parameter in parameters]
    try:
        for parameter, _ in before:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient


def taken_gradients(parameters: Iterable[Parameter]) -> list[Tensor | None]:
    """The parameters' gradients, which they no longer have."""
    found: list[Tensor | None] = []
    for parameter in parameters:
        found.append(parameter.grad)
        parameter.grad = None
    return found


def _sharding_modules(model: nn.Module) -> list[Any]:
    if not (dist.is_available() and dist.is_initialized()):
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]
