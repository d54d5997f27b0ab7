"""What the explanations in the README rest on: fixed costs, layouts, memory that is handed back."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from reference_runs import _common as common
from reference_runs.speed.run import interleaved
from reference_runs.speed.sections.base import Effort, Jobs, Record, Section, medians
from reference_runs.speed.sections.training import Network, make, uniform
from sparsetrain.storage import SparseLinear
from sparsetrain.storage.csr.kernels import kernels_for

BATCH = 128
#: Of glibc: keep what is freed instead of handing it back to the system.
KEEP_FREED = {"MALLOC_MMAP_THRESHOLD_": str(1 << 40), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
_ALLOCATOR_WIDTH = 300_000


def cases(quick: bool) -> list[Record]:
    """The questions."""
    return [{"what": what} for what in _JOBS if not (quick and what == _ALLOCATOR)]


def measure(case: Record, effort: Effort) -> Record:
    """Milliseconds of each job."""
    if case["what"] == _ALLOCATOR:
        return {"ms": {"as it is": _step_at_scale({}), "kept": _step_at_scale(KEEP_FREED)}}
    jobs = _JOBS[case["what"]]()
    times = interleaved(jobs, rounds=effort.rounds, seconds=effort.seconds / 4, warm_up=5)
    return {"ms": medians(times)}


def _smallest_network() -> Jobs:
    tiny = Network(784, (16, 16))
    return {
        f"{tiny}, plain torch": make("dense", tiny, uniform(0.0), "SGD", BATCH).step,
    }


def _loops() -> Jobs:
    """Every loop over non-zeros in a step of the narrow network at 99 %."""
    first, second = SparseLinear(784, 1024, 0.01), SparseLinear(1024, 1024, 0.01)
    x, h, grad = (torch.randn(n, BATCH) for n in (784, 1024, 1024))
    kernels = kernels_for(torch.float32)

    def loops() -> None:
        kernels.product(first.pattern, first.values, x, first.bias)
        kernels.product(second.pattern, second.values, h, second.bias)
        kernels.gradients(second.pattern, second.values, h, grad)
        kernels.values_gradient(first.pattern, x, grad)

    return {"both products, three gradients": loops}


def _dense_product() -> Jobs:
    x, weight = torch.randn(BATCH, 4096), torch.randn(4096, 4096)
    return {"4096 x 4096, batch 128": lambda: F.linear(x, weight)}


def _relu_backward() -> Jobs:
    """Of 1024 features, with the gradient in the layout of the activation and in the other."""
    activation = torch.relu(torch.randn(1024, BATCH)).t()
    same, other = torch.randn(1024, BATCH).t(), torch.randn(BATCH, 1024)

    def backward(grad: torch.Tensor) -> Callable[[], object]:
        return lambda: torch.ops.aten.threshold_backward(grad, activation, 0.0)

    return {"one layout": backward(same), "two layouts": backward(other)}


def _step_at_scale(environment: dict[str, str]) -> float:
    command = [sys.executable, "-m", "reference_runs.speed.sections.causes"]
    answer = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, **environment}
    )
    return float(answer.stdout)


def _timed_step() -> float:
    """Median milliseconds of a step of three hidden layers with ten inputs a neuron."""
    width = _ALLOCATOR_WIDTH
    model = nn.Sequential(
        SparseLinear(784, width, 10 / 784),
        nn.ReLU(),
        SparseLinear(width, width, 10 / width),
        nn.ReLU(),
        SparseLinear(width, width, 10 / width),
        nn.ReLU(),
        SparseLinear(width, 10, 1.0),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    x, y = torch.randn(32, 784), torch.randint(10, (32,))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return medians(interleaved({"step": step}, rounds=7, seconds=0.1, warm_up=3))["step"]


_ALLOCATOR = f"a step at {_ALLOCATOR_WIDTH:,} neurons a layer, freed memory"
_JOBS: dict[str, Callable[[], Jobs]] = {
    "the smallest step": _smallest_network,
    "loops over non-zeros, narrow network at 99 %": _loops,
    "dense product": _dense_product,
    "ReLU backward beside a dense layer": _relu_backward,
    _ALLOCATOR: dict,
}


def table(rows: list[Record]) -> str:
    """One row a job."""
    lines = [
        (row["what"], name, f"{milliseconds:.3f}")
        for row in rows
        for name, milliseconds in row["ms"].items()
    ]
    return common.markdown_table(("why", "", "ms"), lines)


SECTION = Section(cases, measure, table)

if __name__ == "__main__":
    print(_timed_step())
