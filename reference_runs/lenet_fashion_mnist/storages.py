"""Accuracy is not paid for csr storage: the same runs with masks and truly sparse.

    python -m reference_runs.lenet_fashion_mnist.storages --workers 2

from the repository's root. Finished runs are kept in storages.jsonl, so the same command goes on
where it was stopped.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from pathlib import Path

from reference_runs import _common as common
from reference_runs.lenet_fashion_mnist.methods import LABELS, policy
from reference_runs.lenet_fashion_mnist.run import HERE, Settings, begin, steps_of

METHODS = ("static_erk", "set", "rigl")
SPARSITIES = (0.95, 0.98)
STORAGES = ("masked", "csr")


def train(job: common.Record, report: common.Report) -> common.Record:
    """One run: test error after the last step, and seconds of training."""
    settings = Settings()
    steps = steps_of(settings)
    chosen = policy(job["method"], job["sparsity"], steps)
    trainer = begin(settings, job["seed"], chosen, job["storage"])
    for record in trainer.run(steps):
        words = f"test {100 * record.test_accuracy:.1f} %"
        report(job["key"], record.epoch, settings.epochs, words)
    seconds = [record.seconds for record in trainer.history.records]
    return {
        **{key: job[key] for key in ("method", "sparsity", "seed", "storage")},
        "test_error": round(100 * (1 - trainer.history.last.test_accuracy), 3),
        # An epoch that was disturbed does not count.
        "seconds": round(statistics.median(seconds) * settings.epochs, 2),
    }


def summarise(runs: list[common.Record]) -> list[common.Record]:
    """One row a method and sparsity, the storages side by side."""
    groups: dict[tuple[str, float, str], list[common.Record]] = defaultdict(list)
    for run in runs:
        groups[run["method"], run["sparsity"], run["storage"]].append(run)
    rows = []
    for method in METHODS:
        for sparsity in SPARSITIES:
            row: common.Record = {"method": method, "sparsity": sparsity}
            for storage in STORAGES:
                mine = groups[method, sparsity, storage]
                errors = [run["test_error"] for run in mine]
                row[storage] = {
                    "test_error": round(common.mean(errors), 3),
                    "standard_error": round(common.standard_error(errors), 3),
                    "seconds": round(common.mean([run["seconds"] for run in mine]), 1),
                }
            rows.append(row)
    return rows


def table(rows: list[common.Record]) -> str:
    """The rows as a markdown table."""
    header = ("", "masked [%]", "csr [%]", "masked [s]", "csr [s]")
    lines = []
    for row in rows:
        masked, csr = (row[storage] for storage in STORAGES)
        lines.append(
            (
                f"{LABELS[row['method']]}, {row['sparsity']:.0%}",
                *(f"{m['test_error']:.2f} ± {m['standard_error']:.2f}" for m in (masked, csr)),
                *(f"{m['seconds']:.1f}" for m in (masked, csr)),
            )
        )
    return common.markdown_table(header, lines)


def main() -> None:
    """Run what is missing, write storages.json, and put the table into README.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--log", type=Path, default=HERE / "storages.jsonl")
    arguments = parser.parse_args()
    # Both storages of a run come one after the other, under the same conditions.
    jobs = [
        {
            "key": f"{method}-{sparsity}-{seed}-{storage}",
            "method": method,
            "sparsity": sparsity,
            "seed": seed,
            "storage": storage,
        }
        for seed in range(arguments.seeds)
        for method in METHODS
        for sparsity in SPARSITIES
        for storage in STORAGES
    ]
    runs = common.run_jobs(jobs, train, common.ResultLog(arguments.log), workers=arguments.workers)
    rows = summarise(runs)
    result = {"machine": common.machine(), "table": rows, "runs": runs}
    common.write_json(HERE / "storages.json", result)
    common.put_into(HERE / "README.md", table(rows), section="storages")


if __name__ == "__main__":
    main()
