"""What RigL's updates cost: its total time over a thousand steps, beside that of a static mask."""

from __future__ import annotations

import time
from itertools import pairwise

import sparsetrain as st
from reference_runs import _common as common
from reference_runs.speed.run import ratio
from reference_runs.speed.sections.base import (
    Effort,
    Record,
    Section,
    milliseconds,
    per_cent,
    with_quartiles,
)
from reference_runs.speed.sections.training import NETWORKS, Training, make, uniform
from sparsetrain.policies import Policy

EVERY, BLOCKS = 100, 10  # steps between updates; updates, each in a block of its own
GOAL = 1.15
_WARM_UP = 10


def cases(quick: bool) -> list[Record]:
    """Both networks at 95 %."""
    networks = ("narrow",) if quick else ("wide", "narrow")
    return [{"network": name, "batch": 128, "sparsity": 0.95} for name in networks]


def measure(case: Record, effort: Effort) -> Record:
    """Blocks of steps, RigL and Static in turn; each block of RigL's has one update within it."""
    every = 10 if effort.quick else EVERY
    network, batch = NETWORKS[case["network"]], case["batch"]
    rigl = make("csr", network, _rigl(case["sparsity"], every), "SGD", batch)
    static = make("csr", network, uniform(case["sparsity"]), "SGD", batch)
    _run(static, _WARM_UP)  # the kernels of both are compiled then
    times: dict[str, list[list[float]]] = {"rigl": [], "static": []}
    for number in range(BLOCKS):
        for name in ("rigl", "static") if number % 2 else ("static", "rigl"):
            times[name].append(_run({"rigl": rigl, "static": static}[name], every))
    ours, theirs = ([sum(block) for block in times[name]] for name in ("rigl", "static"))
    return {
        "steps": every * BLOCKS,
        "updates": BLOCKS,
        "rigl_seconds": round(sum(ours), 4),
        "static_seconds": round(sum(theirs), 4),
        "total_ratio": round(sum(ours) / sum(theirs), 4),
        "block_ratio": ratio(ours, theirs),
        "static_step_ms": milliseconds([t for block in times["static"] for t in block]),
        # The update takes the place of a gradient step, and the next step transposes the pattern.
        "update_step_ms": milliseconds([block[every // 2] for block in times["rigl"]]),
        "step_after_ms": milliseconds([block[every // 2 + 1] for block in times["rigl"]]),
    }


def _rigl(sparsity: float, every: int) -> Policy:
    """Updates in the middle of each block, until the end."""
    update = st.UpdateSchedule(every=every, start=every // 2, stop=1.0)
    return st.RigL(
        sparsity=sparsity, allocation=st.Uniform(), total_steps=every * BLOCKS, update=update
    )


def _run(training: Training, steps: int) -> list[float]:
    """Seconds of each step."""
    marks = [time.perf_counter()]
    for _ in range(steps):
        training.step()
        marks.append(time.perf_counter())
    return [after - before for before, after in pairwise(marks)]


def table(rows: list[Record]) -> str:
    """One row a network."""
    head = [
        "RigL, all steps and updates",
        "sparsity",
        "over Static",
        "a block",
        "goal",
        "static step [ms]",
        "update [ms]",
        "step after it [ms]",
    ]
    shown = [
        [
            NETWORKS[row["network"]],
            per_cent(row["sparsity"]),
            f"**{row['total_ratio']:.3f}**",
            with_quartiles(row["block_ratio"], 3),
            f"{GOAL:g}",
            f"{row['static_step_ms']:.2f}",
            f"{row['update_step_ms']:.2f}",
            f"{row['step_after_ms']:.2f}",
        ]
        for row in rows
    ]
    return common.markdown_table(head, shown)


SECTION = Section(cases, measure, table)
