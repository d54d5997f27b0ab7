"""Every kernel by shape, density and batch: the table behind the choice in `csr/kernels.py`."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from reference_runs import _common as common
from reference_runs.speed.run import interleaved, ratio
from reference_runs.speed.sections.base import Effort, Jobs, Record, Section, medians, per_cent
from sparsetrain.storage.csr import torch_kernels
from sparsetrain.storage.csr.kernels import kernels_for, numba_kernels
from sparsetrain.storage.csr.layers import SparseLinear
from sparsetrain.storage.csr.pattern import Pattern

WIDTHS = (512, 1024, 4096)
DENSITIES = (0.2, 0.1, 0.05, 0.02, 0.01)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 100, 128, 256)
OPERATIONS = {
    "product": "forward product",
    "values_gradient": "gradient of the values",
    "gradients": "both gradients",
}
#: A choice that is slower than the fastest by more than this is named.
TOLERANCE = 1.1


def cases(quick: bool) -> list[Record]:
    """Square layers, densities and batches."""
    grid = product((512,), (0.1,), (1, 16, 128)) if quick else product(WIDTHS, DENSITIES, BATCHES)
    return [dict(zip(("width", "density", "batch"), values, strict=True)) for values in grid]


def measure(case: Record, effort: Effort) -> Record:
    """For each operation the milliseconds of each kernel, and how the choices compare."""
    width, batch = case["width"], case["batch"]
    generator = torch.Generator().manual_seed(0)
    layer = SparseLinear(width, width, case["density"], bias=False, generator=generator)
    x = torch.randn(width, batch, generator=generator)
    grad = torch.randn(width, batch, generator=generator)
    values = layer.values.detach()
    groups = {
        "product": _products(layer.pattern, values, x),
        "values_gradient": _values_gradients(layer.pattern, x, grad),
        "gradients": _both_gradients(layer.pattern, values, x, grad),
    }
    return {name: _compare(name, jobs, batch, effort) for name, jobs in groups.items()}


def _products(pattern: Pattern, values: Tensor, x: Tensor) -> Jobs:
    start, columns = pattern.pointers[:-1], pattern.columns
    jobs: Jobs = {
        "embedding_bag": lambda: F.embedding_bag(
            columns, x, start, per_sample_weights=values, mode="sum"
        ),
        # The values change at every step, so the tensor is made anew, as in training.
        "MKL": lambda: (
            torch.sparse_csr_tensor(pattern.pointers, columns, values, pattern.shape) @ x
        ),
    }
    numba = numba_kernels()
    if numba is not None:
        jobs["numba"] = lambda: numba.product(pattern, values, x, None)
    return jobs


def _values_gradients(pattern: Pattern, x: Tensor, grad: Tensor) -> Jobs:
    jobs: Jobs = {"sampled_addmm": lambda: torch_kernels.values_gradient(pattern, x, grad)}
    numba = numba_kernels()
    if numba is not None:
        jobs["numba"] = lambda: numba.values_gradient(pattern, x, grad)
    return jobs


def _both_gradients(pattern: Pattern, values: Tensor, x: Tensor, grad: Tensor) -> Jobs:
    """In one walk with numba; else by two kernels, of which the first is that of the product."""
    jobs: Jobs = {"torch": lambda: torch_kernels.gradients(pattern, values, x, grad)}
    numba = numba_kernels()
    if numba is not None:
        jobs["numba"] = lambda: numba.gradients(pattern, values, x, grad)
        jobs["numba, two walks"] = lambda: (
            numba.input_gradient(pattern, values, grad),
            numba.values_gradient(pattern, x, grad),
        )
    return jobs


def _compare(operation: str, jobs: Jobs, batch: int, effort: Effort) -> Record:
    with torch.no_grad():
        effort = effort.scaled(0.1)
        times = interleaved(jobs, rounds=effort.rounds, seconds=effort.seconds, warm_up=2)
    chosen, of_torch = chosen_kernel(operation, batch)
    others = {name: taken for name, taken in times.items() if name != chosen}
    result: Record = {"chosen": chosen, "ms": medians(times)}
    if others:
        nearest = min(others, key=lambda name: sum(others[name]))
        result |= {"next": nearest, "next_over_chosen": ratio(times[nearest], times[chosen])}
    if operation == "product":
        other = "MKL" if of_torch == "embedding_bag" else "embedding_bag"
        result |= {"chosen_of_torch": of_torch, "of_torch": ratio(times[other], times[of_torch])}
    return result


def chosen_kernel(operation: str, batch: int) -> tuple[str, str]:
    """What the package computes with: the best there is, and the best of torch's own."""
    of_torch = {
        "product": "MKL" if batch < torch_kernels._BAG_FROM else "embedding_bag",
        "values_gradient": "sampled_addmm",
        "gradients": "torch",
    }[operation]
    return (of_torch if kernels_for(torch.float32) is torch_kernels else "numba"), of_torch


def misses(rows: list[Record]) -> list[str]:
    """Where the choice is not the fastest, by more than the tolerance."""
    found = []
    for row in rows:
        where = f"{row['width']}², {per_cent(row['density'])} dense, batch {row['batch']}"
        for operation, label in OPERATIONS.items():
            measured = row[operation]
            if "next" in measured and measured["next_over_chosen"]["ratio"] < 1 / TOLERANCE:
                slower = 1 / measured["next_over_chosen"]["ratio"]
                found.append(
                    f"{label}, {where}: the choice takes {slower:.2f} times as long as "
                    f"{measured['next']} alone"
                )
            if "of_torch" in measured and measured["of_torch"]["ratio"] < 1 / TOLERANCE:
                slower = 1 / measured["of_torch"]["ratio"]
                found.append(
                    f"{label} without numba, {where}: {measured['chosen_of_torch']} takes "
                    f"{slower:.2f} times as long as the other"
                )
    return found


def table(rows: list[Record]) -> str:
    """For each operation: the fastest other kernel's time over that of the one chosen."""
    parts = [_grid(rows, name, label) for name, label in OPERATIONS.items()]
    found = misses(rows)
    parts.append(
        "The choice is nowhere slower than the fastest by more than 10 %."
        if not found
        else "Not the fastest by more than 10 %:\n\n" + "\n".join(f"- {miss}" for miss in found)
    )
    return "\n\n".join(parts)


def _grid(rows: list[Record], operation: str, label: str) -> str:
    batches = sorted({row["batch"] for row in rows})
    lines: dict[tuple[int, float], dict[int, str]] = {}
    for row in rows:
        measured = row[operation]
        cell = "" if "next" not in measured else f"{measured['next_over_chosen']['ratio']:.2f}"
        lines.setdefault((row["width"], row["density"]), {})[row["batch"]] = cell
    head = [f"{label}: next best over chosen", *(f"batch {batch}" for batch in batches)]
    shown = [
        [
            f"{width} x {width}, {per_cent(density)} dense",
            *(cells.get(batch, "") for batch in batches),
        ]
        for (width, density), cells in lines.items()
    ]
    return common.markdown_table(head, shown)


SECTION = Section(cases, measure, table)
