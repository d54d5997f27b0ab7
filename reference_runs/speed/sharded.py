"""Mask updates of sharded weights: milliseconds against one process, and bytes that are sent.

    python -m reference_runs.speed.sharded            # about 2 minutes
    python -m reference_runs.speed.sharded --ranks 4

from the repository's root, on a machine that does nothing else. Ranks are processes of this
machine, over gloo; in each round one of them alone updates whole weights, and then all of them
update sharded ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard

import sparsetrain as st
from reference_runs import _common as common

HERE = Path(__file__).parent
RESULTS = HERE / "sharded.json"
WIDTH, BLOCKS, ROUNDS = 512, 3, 15
_UPDATE: dict[str, Any] = {"total_steps": 1000, "update": {"every": 100}}
POLICIES: dict[str, st.Policy] = {
    "SET": st.SET(sparsity=0.9, **_UPDATE),
    "RigL": st.RigL(sparsity=0.9, **_UPDATE),
    "SNFS": st.SNFS(sparsity=0.9, **_UPDATE),
    "RigL, constant fan-in": st.RigL(sparsity=0.9, structure="constant_fan_in", **_UPDATE),
    "Gradual": st.Gradual(sparsity=0.9, **_UPDATE),
    "Gradual, across layers": st.Gradual(sparsity=0.9, allocation="global", **_UPDATE),
    "SR-STE 2:4": st.NMSparse(n=2, m=4),
}


def network() -> nn.Sequential:
    """The matrices of three transformer blocks of width 512, one after the other: 11.0 M."""
    torch.manual_seed(0)
    shapes = [(WIDTH, 3 * WIDTH), (3 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)]
    layers = [nn.Linear(a, b, bias=False) for a, b in shapes * BLOCKS]
    return nn.Sequential(*layers)


def updater(model: nn.Module, policy: st.Policy) -> Callable[[], None]:
    """A function that makes one mask update of an optimizer in training, each as if at a later
    step, so that rising sparsities do rise."""
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = st.SparseOptimizer(base, model, policy)
    torch.manual_seed(1)
    model(torch.randn(16, WIDTH)).square().mean().backward()

    def update() -> None:
        optimizer._keeper.step_count += 40
        optimizer.update_masks()

    return update


class Counter:
    """Counts the bytes that this rank gives to all-reduces, the one collective of an update."""

    def __init__(self) -> None:
        self.bytes = self.calls = 0
        self._original = dist.all_reduce

    def __enter__(self) -> Counter:
        dist.all_reduce = self._count
        return self

    def __exit__(self, *error: object) -> None:
        dist.all_reduce = self._original

    def _count(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.bytes += tensor.numel() * tensor.element_size()
        self.calls += 1
        return self._original(tensor, *args, **kwargs)


def work(rank: int, ranks: int, folder: str) -> None:
    """Measure every policy; rank 0 writes what it finds."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    found: dict[str, Any] = {}
    for name, policy in POLICIES.items():
        model = network()
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
        sharded = updater(model, policy)
        whole = updater(network(), policy) if rank == 0 else None
        with Counter() as counter:
            sharded()
        times: dict[str, list[float]] = {"whole": [], "sharded": []}
        for _ in range(ROUNDS):
            dist.barrier()
            if whole is not None:
                times["whole"].append(timed(whole))
            dist.barrier()
            times["sharded"].append(timed(sharded))
        found[name] = {
            "bytes": counter.bytes,
            "all_reduces": counter.calls,
            **{f"{kind}_ms": values for kind, values in times.items() if values},
        }
    weights = sum(p.numel() for p in network().parameters())
    if rank == 0:
        common.write_json(Path(folder) / "found.json", {"weights": weights, "policies": found})
    dist.barrier()
    dist.destroy_process_group()


def timed(update: Callable[[], None]) -> float:
    """Milliseconds of one update."""
    started = time.perf_counter()
    update()
    return 1000 * (time.perf_counter() - started)


def table(results: dict[str, Any]) -> str:
    """A row a policy."""
    ranks, weights = results["ranks"], results["weights"]
    gathered = 4 * weights
    rows = []
    for name, found in results["policies"].items():
        whole, sharded = (statistics.median(found[f"{kind}_ms"]) for kind in ("whole", "sharded"))
        sent = found["bytes"]
        fewer = f"**{gathered / sent:,.0f}x**" if sent else "nothing"
        ratio = f"{sharded / whole:.2f}"
        rows.append(
            [
                name,
                f"{whole:.1f}",
                f"{sharded:.1f}",
                ratio,
                found["all_reduces"],
                f"{sent:,}",
                fewer,
            ]
        )
    header = ["one update", "one process [ms]", f"{ranks} ranks [ms]", "ratio", "all-reduces"]
    header += ["bytes a rank sends", "fewer than the weights"]
    return common.markdown_table(header, rows)


def main() -> None:
    """Measure and write the section of the README."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (arguments.ranks, folder), nprocs=arguments.ranks)
        found = json.loads((Path(folder) / "found.json").read_text(encoding="utf-8"))
    results = {"machine": common.machine(), "ranks": arguments.ranks, **found}
    common.console.print(table(results))
    if arguments.ranks == 2:
        common.write_json(RESULTS, results)
        common.put_into(HERE / "README.md", table(results), section="sharded")


if __name__ == "__main__":
    main()
