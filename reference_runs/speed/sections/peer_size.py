"""Three hidden layers of 10,000 neurons, the size that the peers were measured at."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import sparsetrain as st
from reference_runs import _common as common
from reference_runs.speed.sections.base import Effort, Record, Section, compare, with_quartiles
from reference_runs.speed.sections.training import Network, Training, make
from sparsetrain.policies import Policy
from sparsetrain.storage.csr.target import CsrTarget

EPSILON, BATCH = 20, 128
NETWORK = Network(784, (10_000, 10_000, 10_000))
STEP_GOAL, UPDATE_GOAL = 45.0, 10.0  # ms; an update for each 125,000 non-zeros
UNIT = 125_000
#: As the issue's author measured them on another machine: ms a step, ms an update for each unit.
PEERS: dict[str, tuple[str, str]] = {
    "dense torch": ("2,770", ""),
    "SET authors' truly sparse code (SciPy)": ("656 to 765", "5,800"),
    "Nerva (C++)": ("2,600", "33"),
}


def cases(quick: bool) -> list[Record]:
    """One; quick at a tenth of the width."""
    return [{"width": 1000 if quick else 10_000, "epsilon": EPSILON, "batch": BATCH}]


def measure(case: Record, effort: Effort) -> Record:
    """A training step, dense and with SET, and one topology update."""
    network = Network(784, (case["width"],) * 3)
    policy = _set()
    # Ours comes first: it is dense for a moment, before its weights are held by their non-zeros.
    ours, dense = (make(held, network, policy, "SGD", BATCH) for held in ("csr", "dense"))
    # A few calls warm up: a dense step takes seconds.
    compared = compare({"dense": dense.step, "csr": ours.step}, "dense", effort, warm_up=2)
    del dense
    updates = _updates(ours, effort.rounds)
    targets = ours.optimizer.targets.values()
    nonzeros = sum(target.active for target in targets if isinstance(target, CsrTarget))
    return {
        **compared,
        "nonzeros": nonzeros,
        "weights": sum(target.numel for target in targets),
        **{f"{name}_ms": round(1e3 * s, 3) for name, s in updates.items()},
        **{
            f"{name}_ms_a_unit": round(1e3 * seconds * UNIT / nonzeros, 3)
            for name, seconds in updates.items()
        },
    }


def _set() -> Policy:
    """SET whose updates never come due by themselves, so that they can be timed alone."""
    return st.SET(
        allocation=st.ErdosRenyi(epsilon=EPSILON),
        total_steps=10**9,
        update=st.UpdateSchedule(every=10**8, start=10**8),
    )


def _updates(training: Training, rounds: int) -> dict[str, float]:
    """Median seconds of an update alone, and with the transposed patterns it leaves to be made."""
    optimizer: Any = training.optimizer
    layers = [t.layer for t in optimizer.targets.values() if isinstance(t, CsrTarget)]
    taken: dict[str, list[float]] = {"update": [], "update_and_transposing": []}
    for _ in range(rounds + 1):
        training.step()
        alone = _seconds(optimizer.update_masks)
        transposing = _seconds(lambda: [layer.pattern.transposed() for layer in layers])
        taken["update"].append(alone)
        taken["update_and_transposing"].append(alone + transposing)
    return {name: statistics.median(seconds[1:]) for name, seconds in taken.items()}


def _seconds(job: Callable[[], object]) -> float:
    started = time.perf_counter()
    job()
    return time.perf_counter() - started


def table(rows: list[Record]) -> str:
    """Ours and dense on this machine, then the peers on another one."""
    # The last layer is dense: epsilon 20 asks for more connections than ten classes have.
    row = rows[0]
    width, ms = row["width"], row["ms"]
    head = [
        f"784-{width}-{width}-{width}-10, epsilon {row['epsilon']}, batch {row['batch']}",
        "step [ms]",
        "times faster than dense here",
        "one SET update a 125,000 non-zeros [ms]",
    ]
    shown = [
        [
            f"sparsetrain csr, SET, {row['nonzeros']:,} of {row['weights']:,} weights",
            f"**{ms['csr']:.1f}**",
            with_quartiles(row["speedup"]["csr"], 1),
            f"**{row['update_and_transposing_ms_a_unit']:.2f}** "
            f"({row['update_ms_a_unit']:.2f} without transposing)",
        ],
        ["goal", f"{STEP_GOAL:g}", "", f"{UPDATE_GOAL:g}"],
        ["dense torch", f"{ms['dense']:.0f}", "1", ""],
        *([f"{name}, another machine", a, "", b] for name, (a, b) in PEERS.items()),
    ]
    return common.markdown_table(head, shown)


SECTION = Section(cases, measure, table)
