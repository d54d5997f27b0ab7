"""Memory in training at 98 %: live tensors counted, and peaks of fresh processes."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from itertools import product

from reference_runs import _common as common
from reference_runs.speed.sections.base import Effort, Record, Section, per_cent
from reference_runs.speed.sections.footprint import SPARSITY
from reference_runs.speed.sections.process_memory import ENVIRONMENT

#: How the weights are held -> the words for it.
HELD = {
    "dense": "dense torch",
    "masked": "masked",
    "csr": "csr, from a dense network",
    "built": "csr, built sparse",
}
KINDS = ("weights", "gradients", "state", "places")
GOAL = 0.08
_REPEATS = 3


def cases(quick: bool) -> list[Record]:
    """Each way to hold weights, with a small and a large optimizer state."""
    optimizers = ("SGD",) if quick else ("SGD", "AdamW")
    return [{"optimizer": o, "held": held} for o, held in product(optimizers, HELD)]


def measure(case: Record, effort: Effort) -> Record:
    """Median over fresh processes, less what a process takes that builds nothing."""
    repeats = 1 if effort.quick else _REPEATS
    idle = [_ask("nothing", case["optimizer"])["peak_training"] for _ in range(repeats)]
    answers = [_ask(case["held"], case["optimizer"]) for _ in range(repeats)]
    result: Record = {kind: answers[0][kind] for kind in KINDS}
    for name in ("peak_building", "peak_training"):
        median = statistics.median(answer[name] for answer in answers)
        result[name] = round(median - statistics.median(idle))
    return result


def _ask(held: str, optimizer: str) -> dict[str, int]:
    command = [sys.executable, "-m", "reference_runs.speed.sections.footprint", held, optimizer]
    environment = {**os.environ, **ENVIRONMENT}
    answer = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    result: dict[str, int] = json.loads(answer.stdout)
    return result


def table(rows: list[Record]) -> str:
    """Megabytes, and everything as a multiple of dense training."""
    head = [
        f"memory, wide network at {per_cent(SPARSITY)} [MB]",
        "optimizer",
        *KINDS,
        "together",
        "over dense",
        "peak",
        "over dense",
        "peak while built",
    ]
    totals = {_key(row): sum(row[kind] for kind in KINDS) for row in rows}
    peaks = {_key(row): row["peak_training"] for row in rows}
    shown = []
    for row in rows:
        key, dense = _key(row), ("dense", row["optimizer"])
        shown.append(
            [
                HELD[row["held"]],
                row["optimizer"],
                *(_megabytes(row[kind]) for kind in KINDS),
                _megabytes(totals[key]),
                _over(totals, key, dense),
                _megabytes(peaks[key]),
                _over(peaks, key, dense),
                _megabytes(row["peak_building"]),
            ]
        )
    note = f"The goal is {GOAL:g} times dense for weights, gradients and state together."
    return common.markdown_table(head, shown) + "\n\n" + note


def _key(row: Record) -> tuple[str, str]:
    return row["held"], row["optimizer"]


def _megabytes(number: int) -> str:
    return f"{number / 1e6:.1f}"


def _over(numbers: dict[tuple[str, str], int], key: tuple[str, str], dense: tuple[str, str]) -> str:
    return f"**{numbers[key] / numbers[dense]:.3f}**" if dense in numbers else ""


SECTION = Section(cases, measure, table)
