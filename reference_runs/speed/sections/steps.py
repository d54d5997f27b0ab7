"""A whole training step, sparse against dense."""

from __future__ import annotations

from itertools import product
from typing import get_args

from reference_runs import _common as common
from reference_runs.speed.sections.base import (
    Effort,
    Record,
    Section,
    compare,
    per_cent,
    with_quartiles,
)
from reference_runs.speed.sections.training import (
    NETWORKS,
    Held,
    check_held,
    make,
    uniform,
)

#: Speed-ups that were asked for, at batch 128.
GOALS = {
    "wide": {0.8: 2.0, 0.9: 3.5, 0.95: 6.5, 0.98: 13.0, 0.99: 20.0},
    "narrow": {0.8: 1.5, 0.9: 3.0, 0.95: 5.0, 0.98: 7.0, 0.99: 9.0},
}
GOAL_BATCH = 128


def cases(quick: bool) -> list[Record]:
    """Networks, batches, optimizers and sparsities."""
    names = ("network", "batch", "optimizer", "sparsity")
    if quick:
        return [
            dict(zip(names, values, strict=True))
            for values in (("narrow", 128, "SGD", 0.9), ("wide", 32, "AdamW fused", 0.98))
        ]
    sparsities = tuple(GOALS["wide"])
    grid = [
        *product(("wide", "narrow"), (128, 32), ("SGD",), sparsities),
        *product(("wide", "narrow"), (128,), ("AdamW fused",), (0.9, 0.98)),
    ]
    return [dict(zip(names, values, strict=True)) for values in grid]


def measure(case: Record, effort: Effort) -> Record:
    """Milliseconds a step of each way to hold the weights, and speed-ups over dense."""
    network, policy = NETWORKS[case["network"]], uniform(case["sparsity"])
    contenders = {
        held: make(held, network, policy, case["optimizer"], case["batch"])
        for held in get_args(Held)
    }
    for held, training in contenders.items():
        check_held(training, held, case["sparsity"])
    jobs = {held: training.step for held, training in contenders.items()}
    return compare(jobs, "dense", effort)


def goal(case: Record) -> float | None:
    """The speed-up asked for, where one was."""
    if case["batch"] != GOAL_BATCH:
        return None
    return GOALS[case["network"]].get(case["sparsity"])


def table(rows: list[Record]) -> str:
    """One row a case."""
    head = [
        "training step",
        "batch",
        "optimizer",
        "sparsity",
        "dense [ms]",
        "csr [ms]",
        "times faster",
        "goal",
        "without numba",
        "masked",
    ]
    shown = []
    for row in rows:
        wanted, faster = goal(row), row["speedup"]
        shown.append(
            [
                NETWORKS[row["network"]],
                row["batch"],
                row["optimizer"],
                per_cent(row["sparsity"]),
                f"{row['ms']['dense']:.2f}",
                f"{row['ms']['csr']:.2f}",
                with_quartiles(faster["csr"]),
                "" if wanted is None else f"{wanted:g}",
                f"{faster['csr, torch kernels']['ratio']:.2f}",
                f"{faster['masked']['ratio']:.2f}",
            ]
        )
    return common.markdown_table(head, shown)


SECTION = Section(cases, measure, table)
