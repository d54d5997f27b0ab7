"""One layer without gradients: ours, torch's own CSR products, and dense."""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from reference_runs import _common as common
from reference_runs.speed.sections.base import (
    Effort,
    Jobs,
    Record,
    Section,
    compare,
    per_cent,
    with_quartiles,
)
from reference_runs.speed.sections.training import with_torch_kernels
from sparsetrain.storage.csr.layers import SparseLinear

#: Speed-ups that were asked for: batch -> sparsity -> times faster than dense.
GOALS = {1: {0.9: 3.4, 0.95: 6.0, 0.98: 11.0}, 64: {0.9: 4.5, 0.95: 9.0, 0.98: 18.0}}
CONTENDERS = ("csr", "csr, torch kernels", "MKL int32", "MKL int64", "F.linear(x, csr)")


def cases(quick: bool) -> list[Record]:
    """Square layers, batches and sparsities."""
    grid = product((2048,), (1, 64), (0.95,)) if quick else product(*_GRID)
    return [dict(zip(("width", "batch", "sparsity"), values, strict=True)) for values in grid]


_GRID = ((2048, 4096), (1, 8, 64, 256), (0.9, 0.95, 0.98))


def measure(case: Record, effort: Effort) -> Record:
    """Milliseconds of each product, after a look that all of them give the same."""
    width, batch = case["width"], case["batch"]
    generator = torch.Generator().manual_seed(0)
    layer = SparseLinear(width, width, 1 - case["sparsity"], bias=False, generator=generator)
    x = torch.randn(batch, width, generator=generator)
    jobs = {name: torch.no_grad()(job) for name, job in _products(layer, x).items()}
    expected = jobs["dense"]()
    for job in jobs.values():
        torch.testing.assert_close(job(), expected, rtol=1e-3, atol=1e-4)
    return compare(jobs, "dense", effort.scaled(0.25))


def _products(layer: SparseLinear, x: Tensor) -> Jobs:
    """All the ways; those of MKL get the batch in the layout that suits them."""
    dense, features = layer.to_dense(), x.t().contiguous()
    held = layer.pattern
    int32, int64 = (
        torch.sparse_csr_tensor(
            held.pointers.to(kind), held.columns.to(kind), layer.values.detach(), held.shape
        )
        for kind in (torch.int32, torch.int64)
    )
    ours: Callable[[], Tensor] = functools.partial(layer, x)
    return {
        "dense": lambda: F.linear(x, dense),
        "csr": ours,
        "csr, torch kernels": with_torch_kernels(ours),
        "MKL int32": lambda: torch.mm(int32, features).t(),
        "MKL int64": lambda: torch.mm(int64, features).t(),
        "F.linear(x, csr)": lambda: F.linear(x, int64),
    }


def table(rows: list[Record]) -> str:
    """One row a case; of the others only how much faster than dense they are."""
    head = ["inference", "batch", "sparsity", "dense [ms]", "csr [ms]", "times faster", "goal"]
    shown = []
    for row in rows:
        goal = GOALS.get(row["batch"], {}).get(row["sparsity"])
        shown.append(
            [
                f"{row['width']} x {row['width']}",
                row["batch"],
                per_cent(row["sparsity"]),
                f"{row['ms']['dense']:.3f}",
                f"{row['ms']['csr']:.3f}",
                with_quartiles(row["speedup"]["csr"]),
                "" if goal is None else f"{goal:g}",
                *(f"{row['speedup'][name]['ratio']:.2f}" for name in CONTENDERS[1:]),
            ]
        )
    return common.markdown_table([*head, *CONTENDERS[1:]], shown)


SECTION = Section(cases, measure, table)
