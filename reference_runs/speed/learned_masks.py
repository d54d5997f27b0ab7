"""What a training step costs with learned masks: ours and a naive one against dense training.

    python -m reference_runs.speed.learned_masks            # about 25 minutes
    python -m reference_runs.speed.learned_masks --quick    # few steps; writes nothing

from the repository's root, on a machine that does nothing else. See the README beside this file.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from reference_runs import _common as common
from reference_runs.speed.learned_loops import (
    CASES,
    NETWORKS,
    OPTIMIZERS,
    Dense,
    Naive,
    Ours,
)
from reference_runs.speed.learned_same import check_same, check_steps
from reference_runs.speed.run import interleaved, ratio

HERE = Path(__file__).parent
RESULTS = HERE / "learned_masks.json"
#: The goal: variational dropout on LeNet-300-100, as a multiple of dense training.
GOAL = 2.5


def measure(
    network: str, optimizer: str, threads: list[int], settle: int, rounds: int, seconds: float
) -> list[common.Record]:
    """All methods under one optimizer, in turn: one row a method and number of threads."""
    torch.set_num_threads(max(threads))
    dense = Dense(network, optimizer)
    dense.settle(settle)
    jobs: dict[str, Callable[[], None]] = {"dense": dense.train_step}
    methods = [m for m, case in CASES.items() if optimizer != "SGD" or case.under_sgd]
    for method in methods:
        ours = Ours(network, optimizer, CASES[method].policy(settle))
        ours.settle(settle)
        ours.require_sparsity(method)
        naive = Naive(network, optimizer, CASES[method], ours)
        if optimizer != "SGD":  # there the gates' gradients are normalised in ours
            check_same(method, network, optimizer, ours, naive)
        jobs[f"ours {method}"], jobs[f"naive {method}"] = ours.train_step, naive.train_step
    rows = []
    for count in threads:
        torch.set_num_threads(count)
        times = interleaved(jobs, rounds=rounds, seconds=seconds, warm_up=10)
        for method in methods:
            mine, theirs = times[f"ours {method}"], times[f"naive {method}"]
            row = {
                "network": network,
                "method": method,
                "optimizer": optimizer,
                "threads": count,
                "dense_ms": round(1e3 * statistics.median(times["dense"]), 3),
                "ours": ratio(mine, times["dense"]),
                "naive": ratio(theirs, times["dense"]),
                "naive_over_ours": ratio(theirs, mine),
            }
            rows.append(row)
            common.console.print(row)
    del jobs
    gc.collect()
    return rows


def tables(rows: list[common.Record]) -> str:
    """A table a network, and what became of the goal."""
    parts = []
    for network, label in NETWORKS.items():
        mine = [row for row in rows if row["network"] == network]
        lines = [
            [
                CASES[row["method"]].label,
                row["optimizer"],
                row["threads"],
                f"{row['dense_ms']:.2f}",
                f"**{row['ours']['ratio']:.2f}** ({_quartiles(row['ours'])})",
                f"{row['naive']['ratio']:.2f} ({_quartiles(row['naive'])})",
                f"{row['naive_over_ours']['ratio']:.2f}",
            ]
            for row in sorted(mine, key=_order)
        ]
        head = [
            f"{label}, step as a multiple of the dense one",
            "optimizer",
            "threads",
            "dense [ms]",
            "sparsetrain",
            "naive",
            "naive over sparsetrain",
        ]
        if lines:
            parts.append(common.markdown_table(head, lines))
    reached = [
        f"{row['ours']['ratio']:.2f} ({row['optimizer']}, threads: {row['threads']})"
        for row in sorted(rows, key=_order)
        if (row["network"], row["method"]) == ("lenet_300_100", "variational_dropout")
    ]
    if reached:
        parts.append(
            f"The goal for variational dropout on LeNet-300-100 is at most {GOAL} times a dense "
            f"step; measured: {', '.join(reached)}."
        )
    return "\n\n".join(parts)


def _quartiles(value: common.Record) -> str:
    low, high = value["quartiles"]
    return f"{low:.2f} to {high:.2f}"


def _cell(row: common.Record) -> tuple[str, str, int]:
    return row["network"], row["optimizer"], row["threads"]


def _order(row: common.Record) -> tuple[int, int, int]:
    optimizer = list(OPTIMIZERS).index(row["optimizer"])
    return list(CASES).index(row["method"]), optimizer, row["threads"]


def main() -> None:
    """Measure, then write learned_masks.json and the tables in the README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=OPTIMIZERS)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.3, help="of a round, for each contender")
    parser.add_argument("--settle", type=int, default=400, help="steps before anything is timed")
    parser.add_argument("--quick", action="store_true", help="few steps; writes nothing")
    parser.add_argument("--only-write", action="store_true", help="tables of the last run")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.seconds, arguments.settle = 3, 0.02, 60
    # Momenta of what is dropped decay into denormal numbers, on which a CPU is many times slower.
    torch.set_flush_denormal(True)
    rows: list[common.Record] = []
    if RESULTS.exists() and not arguments.quick:
        rows = json.loads(RESULTS.read_text(encoding="utf-8"))["steps"]
    if not arguments.only_write:
        check_steps()
        for network in arguments.networks:
            for optimizer in arguments.optimizers:
                new = measure(
                    network,
                    optimizer,
                    arguments.threads,
                    arguments.settle,
                    arguments.rounds,
                    arguments.seconds,
                )
                replaced = {_cell(row) for row in new}
                rows = [row for row in rows if _cell(row) not in replaced] + new
                if not arguments.quick:
                    common.write_json(RESULTS, {"machine": common.machine(), "steps": rows})
    common.console.print(tables(rows), soft_wrap=True, markup=False)
    if not arguments.quick:
        common.put_into(HERE / "README.md", tables(rows), section="learned")


if __name__ == "__main__":
    main()
