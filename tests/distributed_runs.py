"""Training on several gloo processes of this machine: what the tests of `tests/distributed` share.

Ranks see slices of the same batches, so that together they train as one process does.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from runs import OPTIMIZERS, SmallNet, batch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn import functional as F

import sparsetrain as st


def on_ranks(work: Callable[..., Any], ranks: int, folder: Path, *args: Any) -> list[Any]:
    """What `work(rank, folder, *args)` returns on each of so many processes."""
    mp.spawn(_one_rank, (ranks, str(folder), work, args), nprocs=ranks)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def _one_rank(
    rank: int, ranks: int, folder: str, work: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    warnings.filterwarnings("error", module="sparsetrain")
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    try:
        torch.save(work(rank, folder, *args), f"{folder}/{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def mesh_of_all() -> DeviceMesh:
    """One dimension with all ranks."""
    return init_device_mesh("cpu", (dist.get_world_size(),))


def shard(model: nn.Module, mesh: DeviceMesh | None = None) -> nn.Module:
    """As users do it: each layer with weights of its own, then the rest."""
    mesh = mesh_of_all() if mesh is None else mesh
    for layer in model.children():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


class UnevenNet(SmallNet):
    """Rows that neither two nor four ranks can share evenly, and fewer rows than ranks."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(4, 8, 3)
            self.hidden = nn.Linear(32, 13)
            self.head = nn.Linear(13, 3)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int, rank: int, ranks: int
) -> None:
    """Steps first to last - 1, on the rank's slice of each batch."""
    for step in range(first, last):
        x, y = batch(step)
        size = len(x) // ranks
        mine = slice(size * rank, size * (rank + 1))
        optimizer.zero_grad()
        F.cross_entropy(model(x[mine]), y[mine]).backward()
        optimizer.step()


def full(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors, on every rank."""
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
        for name, value in tensors.items()
    }
