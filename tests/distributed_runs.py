"""Training on several gloo processes of this machine: what the tests of `tests/distributed` share.

Ranks see slices of the same batches, so that together they train as one process does. Arithmetic is
in float64: ranks add gradients up in another order, and where a float32 rounding decides which of
two weights is larger, masks would differ by it.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from runs import OPTIMIZERS, POLICIES, STEPS, SmallNet, batch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import sparsetrain as st

_EVERY_3: dict[str, Any] = {"total_steps": STEPS, "update": {"every": 3}}
_EVERY_2: dict[str, Any] = {"total_steps": STEPS, "update": {"every": 2}}
_BUT_HEAD = [{"match": "head*", "dense": True}]

#: Masks that policies choose: every policy, and what takes another path through it.
CHOSEN: dict[str, Any] = {
    **POLICIES,
    "set by sign": st.SET(sparsity=0.7, drop="magnitude_by_sign", grow_std=0.1, **_EVERY_3),
    "set blocks": {
        "policy": {
            "kind": "set",
            "sparsity": 0.5,
            "structure": {"kind": "block", "size": [2, 4]},
            **_EVERY_3,
        },
        "rules": _BUT_HEAD,
    },
    "rigl fan-in": st.RigL(sparsity=0.75, structure="constant_fan_in", **_EVERY_3),
    "rigl 2:4": st.RigL(structure="2:4", **_EVERY_3),
    "gradual global": st.Gradual(sparsity=0.8, allocation="global", **_EVERY_3),
    "gradual movement": st.Gradual(sparsity=0.8, score="movement", **_EVERY_3),
    "gradual blocks": {
        "policy": {
            "kind": "gradual",
            "sparsity": 0.5,
            "structure": {"kind": "block", "size": [4, 2]},
            **_EVERY_3,
        },
        "rules": _BUT_HEAD,
    },
    "static global": st.Static(sparsity=0.8, score="magnitude", allocation="global"),
    "surgery by threshold": st.DynamicNetworkSurgery(c_rate=0.5, total_steps=STEPS),
    "slimming": st.Slimming(strength=0.01),
}
#: Masks that are learned.
LEARNED: dict[str, Any] = {
    "hard concrete": st.HardConcrete(sparsity=0.6, **_EVERY_2),
    "hard concrete exact": st.HardConcrete(sparsity=0.6, exact=True, **_EVERY_2),
    "hard concrete inputs": st.HardConcrete(sparsity=0.5, per="input", **_EVERY_2),
    "hard concrete outputs": st.HardConcrete(sparsity=0.5, per="output", **_EVERY_2),
    "hard concrete strength": st.HardConcrete(strength=0.01, l2=0.1, total_steps=STEPS),
    "gumbel": st.GumbelSoftmax(sparsity=0.6, **_EVERY_2),
    "gumbel blocks": {
        "policy": {
            "kind": "gumbel_softmax",
            "sparsity": 0.6,
            "structure": {"kind": "block", "size": [2, 4]},
            **_EVERY_2,
        },
        "rules": _BUT_HEAD,
    },
    "gumbel 2:4": st.GumbelSoftmax(structure="2:4", total_steps=STEPS),
    # Noise on activations is another draw for each example, so no two runs with other slices agree.
    "variational dropout": st.VariationalDropout(sparsity=0.6, local=False, **_EVERY_2),
    "variational dropout strength": st.VariationalDropout(
        strength=0.01, local=False, total_steps=STEPS
    ),
    "soft threshold": st.SoftThreshold(sparsity=0.6, **_EVERY_2),
    "soft threshold outputs": st.SoftThreshold(
        sparsity=0.6, per="output", allocation="uniform", **_EVERY_2
    ),
    "movement": st.Movement(sparsity=0.6, **_EVERY_2),
    "movement global": st.Movement(sparsity=0.6, allocation="global", **_EVERY_2),
    "movement soft": st.Movement(sparsity=0.6, mode="threshold", **_EVERY_2),
    "movement strength": st.Movement(strength=0.1, mode="threshold", total_steps=STEPS),
}
#: What the rows of `UnevenNet` do not divide by.
NEEDS_EVEN = (
    "nm_sparse",
    "rigl 2:4",
    "set blocks",
    "gradual blocks",
    "gumbel blocks",
    "gumbel 2:4",
)


class UnevenNet(SmallNet):
    """Rows that neither two nor four ranks can share evenly, and fewer rows than ranks."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.hidden = nn.Linear(32, 13)
            self.head = nn.Linear(13, 3)


NETS: dict[str, type[SmallNet]] = {"even": SmallNet, "uneven": UnevenNet}


def cases(net: str) -> list[str]:
    """The policies that a network can be trained with."""
    names = [*CHOSEN, *LEARNED]
    return [name for name in names if net == "even" or name not in NEEDS_EVEN]


def on_ranks(work: Callable[..., Any], ranks: int, folder: Path, *args: Any) -> list[Any]:
    """What `work(rank, *args)` returns on each of so many processes; tensors come back whole."""
    folder.mkdir(exist_ok=True)
    mp.spawn(_one_rank, (ranks, str(folder), work, args), nprocs=ranks)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def once(factory: pytest.TempPathFactory, key: str, *job: Any) -> list[Any]:
    """As `on_ranks(work, ranks, folder, *args)`, for the first test that asks; others wait for it,
    also those of another pytest process."""
    work, ranks, *args = job
    root = factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / key
    ended = folder / "ended"
    try:
        folder.mkdir()
    except FileExistsError:
        while not ended.exists():
            time.sleep(0.2)
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]
    try:
        return on_ranks(work, ranks, folder, *args)
    finally:
        ended.touch()


def _one_rank(
    rank: int, ranks: int, folder: str, work: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    warnings.filterwarnings("error", module="sparsetrain")
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    try:
        torch.save(work(rank, *args), f"{folder}/{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def shard(model: nn.Module, mesh: DeviceMesh | None = None) -> nn.Module:
    """As users do it: each layer with weights of its own, then the rest."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if mesh is None else mesh
    for layer in model.children():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def build(
    net: str,
    policy: str,
    optimizer: str = "momentum",
    *,
    sharded: bool = True,
    first: str = "model",
    mesh: DeviceMesh | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[nn.Module, st.SparseOptimizer]:
    """A network and its wrapped optimizer.

    Args:
        first: which of "model" and "optimizer" is made first; with learned masks the optimizer is.
    """
    model = NETS[net]().to(dtype).eval()
    recipe = CHOSEN[policy] if policy in CHOSEN else LEARNED[policy]
    early = sharded and first == "model" and policy in CHOSEN
    if early:
        shard(model, mesh)
    base = OPTIMIZERS[optimizer](model.parameters())
    wrapped = st.SparseOptimizer(base, model, recipe, seed=3)
    for layer in (model.conv, model.hidden, model.head):  # noise, but no running statistics
        layer.train()
    if sharded and not early:
        shard(model, mesh)
    torch.manual_seed(5)
    return model, wrapped


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int], rank: int, ranks: int
) -> None:
    """Steps of these numbers, on the rank's slice of each batch."""
    for step in steps:
        x, y = batch(step)
        size = len(x) // ranks
        mine = slice(size * rank, size * (rank + 1))
        optimizer.zero_grad()
        F.cross_entropy(model(x[mine].double()), y[mine]).backward()
        optimizer.step()


def full(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors, on every rank."""
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
        for name, value in tensors.items()
    }


def outcome(model: nn.Module, optimizer: st.SparseOptimizer) -> dict[str, Any]:
    """What a run ends with: masks, parameters, and the numbers that the optimizer reports."""
    return {
        "masks": full(optimizer.masks()),
        "weights": full(dict(model.named_parameters())),
        "sparsity": optimizer.sparsity(),
        "penalty": float(optimizer.penalty()),
        "steps": optimizer.step_count,
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Masks to the last bit, and weights but for the order of sums."""
    assert found["masks"].keys() == expected["masks"].keys()
    for name, mask in expected["masks"].items():
        assert torch.equal(found["masks"][name], mask), name
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-6, atol=1e-9)
    assert found["sparsity"] == expected["sparsity"]
    assert found["steps"] == expected["steps"]
    torch.testing.assert_close(found["penalty"], expected["penalty"], rtol=1e-4, atol=1e-12)
