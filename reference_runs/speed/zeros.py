"""Where zeros and denormal numbers cost time on a CPU: the square root, AdamW's step, the mask."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from reference_runs import _common as common
from reference_runs.speed.contenders import WORKLOADS, make
from sparsetrain.storage.kernels import keep_where_
from sparsetrain.workbench import load

WIDTH = 2048
#: Steps after which a first moment without gradients has decayed into denormal numbers.
DECAYED = 1100


def measure() -> list[common.Record]:
    """Milliseconds of each case, two threads, medians."""
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(0)
    dense = torch.rand(WIDTH, WIDTH, generator=generator) * 1e-3
    active = torch.rand(WIDTH, WIDTH, generator=generator) < 0.1
    out = torch.empty_like(dense)
    rows = []

    def note(what: str, milliseconds: float) -> None:
        rows.append({"what": what, "ms": round(milliseconds, 2)})

    for name, values in (
        ("no zeros", dense),
        ("nine in ten are 0", dense * active),
        ("all are 0", torch.zeros_like(dense)),
    ):
        note(f"square root of 4.2 M values, {name}", _median(lambda v=values: v.sqrt_(), values))
    for label, options in (("default", {}), ("fused", {"fused": True})):
        for case in ("dense", "nine in ten without gradient", "the same, state zeroed"):
            note(f"AdamW step, {label}, {case}", _adamw(case, active, options))
    gradient = out.normal_(generator=generator)
    again = _median(lambda: keep_where_(gradient, active))
    note("gradient mask of 4.2 M values, again and again", again)
    for workload in ("LeNet-300-100", "MLP 784-2048-2048-10"):
        note(f"gradient mask in training, {workload}", _mask_in_training(workload))
    for row in rows:
        common.console.print(row)
    return rows


def _median(job: Callable[[], object], restore: Tensor | None = None, times: int = 40) -> float:
    saved = None if restore is None else restore.clone()
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        job()
        taken.append(time.perf_counter() - started)
        if restore is not None and saved is not None:
            restore.copy_(saved)
    return 1e3 * statistics.median(taken)


def _adamw(case: str, active: Tensor, options: dict[str, bool]) -> float:
    param = torch.nn.Parameter(torch.full((WIDTH, WIDTH), 0.02))
    optimizer = torch.optim.AdamW([param], lr=1e-4, **options)
    gradient = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1)) * 1e-3
    param.grad = gradient
    for _ in range(5):
        optimizer.step()
    if case != "dense":
        gradient.mul_(active)
    if case.endswith("state zeroed"):
        for value in optimizer.state[param].values():
            if value.shape == param.shape:
                value.mul_(active)
    for _ in range(DECAYED if case.endswith("gradient") else 5):
        optimizer.step()
    return _median(optimizer.step)


def _mask_in_training(name: str) -> float:
    workload = WORKLOADS[name]
    torch.set_num_threads(workload.threads)
    contender = make("sparsetrain", workload, "SGD", load("fashion_mnist"))
    prepare, taken = contender.handle._keeper.prepare, []

    def timed() -> None:
        started = time.perf_counter()
        prepare()
        taken.append(time.perf_counter() - started)

    contender.handle._keeper.prepare = timed
    for _ in range(120):
        contender.train_step()
    return 1e3 * statistics.median(taken[20:])
