"""Trained networks on Fashion-MNIST that lose channels by every method, before and after tuning.

    python -m reference_runs.channels_fashion_mnist.run --workers 2

from the repository's root. Finished runs are kept in results.jsonl and trained networks in
checkpoints/, so the same command goes on where it was stopped. See the README beside this file.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn import functional as F

import sparsetrain as st
from reference_runs import _common as common
from reference_runs.channels_fashion_mnist.methods import METHODS
from reference_runs.channels_fashion_mnist.networks import (
    EPOCHS,
    HERE,
    NETWORKS,
    begin,
    data,
    fast,
    sgd,
    trained,
)
from sparsetrain.workbench import evaluate
from sparsetrain.workbench.training import EpochRecord

CALIBRATION, CALIBRATION_BATCH = 1024, 64  # training images, the same for every method and seed
FINE_TUNING_STEPS, FINE_TUNING_RATE = 120, 0.02  # cosine to 0
FLOOR = 0.1  # share of channels that a layer keeps where all layers compete
#: What is asked for: label -> arguments of `st.channels.prune`.
CUTS: dict[str, dict[str, Any]] = {
    "30 %": {"ratio": 0.3},
    "50 %": {"ratio": 0.5},
    "70 %": {"ratio": 0.7},
    "0.5x FLOPs": {"flops": 0.5, "round_to": 8},
}
#: Of a network's errors: the key in the results, and what the tables call it.
MOMENTS = {"before": "straight after removal", "after": "after fine-tuning"}


def calibration() -> list[tuple[Any, Any]]:
    """The first training images, in batches."""
    inputs = data().train_x[:CALIBRATION].split(CALIBRATION_BATCH)
    labels = data().train_y[:CALIBRATION].split(CALIBRATION_BATCH)
    return list(zip(inputs, labels, strict=True))


def error_of(model: nn.Module) -> float:
    """Test error as a fraction."""
    return round(1 - evaluate(model, data().test_x, data().test_y), 4)


def train(job: common.Record, report: common.Report) -> common.Record:
    """Train a network, once for all methods."""

    def tell(record: EpochRecord) -> None:
        report(job["key"], record.epoch, EPOCHS, f"test {100 * record.test_accuracy:.1f} %")

    slimming = job["method"] == "trained with the penalty"
    model = trained(job["network"], job["seed"], slimming=slimming, on_epoch=tell)
    named = {name: job[name] for name in ("network", "method", "seed")}
    return {**named, "epochs": EPOCHS, "test_error": error_of(model)}


def remove(job: common.Record, report: common.Report) -> common.Record:
    """One method on one trained network; lists have a value for each of `cuts`."""
    points = []
    for done, cut in enumerate(CUTS):
        report(job["key"], done, len(CUTS), cut)
        points.append(_point(job, cut))
    named = {name: job[name] for name in ("network", "method", "seed")}
    columns = {name: [point[name] for point in points] for name in points[0]}
    return {**named, "cuts": list(CUTS), **columns}


def _point(job: common.Record, cut: str) -> common.Record:
    """Sizes and errors of a smaller network, before and after fine-tuning."""
    method = METHODS[job["method"]]
    started = time.process_time()
    result = st.channels.prune(
        trained(job["network"], job["seed"], slimming=method.slimming),
        data().test_x[:1],
        method.method,
        **CUTS[cut],
        floor=FLOOR,
        calibration=calibration(),
        loss_fn=F.cross_entropy,
        measure_latency=False,
        seed=job["seed"],
    )
    seconds = time.process_time() - started
    model = fast(result.model)
    before = error_of(model)
    optimizer = sgd(model, FINE_TUNING_RATE)
    for _ in begin(model, optimizer, FINE_TUNING_STEPS, job["seed"]).run(FINE_TUNING_STEPS):
        pass
    return {
        "before": before,
        "after": error_of(model),
        "flops": round(result.after.flops / result.before.flops, 4),
        "parameters": round(result.after.parameters / result.before.parameters, 4),
        "channels": {name: after for name, (_, after) in result.layers.items()},
        "prune_seconds": round(seconds, 3),
    }


def dense_jobs(networks: Sequence[str], seeds: int) -> list[common.Record]:
    """Networks to train."""
    return [
        {"key": f"{network}-{method}-{seed}", "network": network, "method": method, "seed": seed}
        for seed in range(seeds)
        for network in networks
        for method in ("trained", "trained with the penalty")
    ]


def removal_jobs(networks: Sequence[str], seeds: int) -> list[common.Record]:
    """All runs, those of the first seed first."""
    return [
        {"key": f"{network}-{name}-{seed}", "network": network, "method": name, "seed": seed}
        for seed in range(seeds)
        for network in networks
        for name in METHODS
    ]


def summarise(runs: Sequence[common.Record]) -> list[common.Record]:
    """One row a network, method and cut; errors in percent."""
    groups: dict[tuple[str, str, str], list[common.Record]] = defaultdict(list)
    for run in runs:
        if "cuts" not in run:
            point = {"before": run["test_error"], "flops": 1.0, "parameters": 1.0}
            groups[run["network"], run["method"], "none"].append(point)
            continue
        for place, cut in enumerate(run["cuts"]):
            names = (*MOMENTS, "flops", "parameters", "prune_seconds")
            point = {name: run[name][place] for name in names}
            groups[run["network"], run["method"], cut].append(point)
    rows = []
    for (network, method, cut), points in groups.items():
        row: common.Record = {"network": network, "method": method, "cut": cut}
        row["seeds"] = len(points)
        for name in points[0]:
            scale = 100 if name in MOMENTS else 1
            values = [scale * point[name] for point in points]
            row[name] = round(common.mean(values), 3)
            row[f"{name}_standard_error"] = round(common.standard_error(values), 3)
        rows.append(row)
    return rows


def cell(row: common.Record | None, name: str) -> str:
    """Mean and standard error; empty where nothing was measured."""
    return "" if row is None else f"{row[name]:.2f} ± {row[f'{name}_standard_error']:.2f}"


def table_of(rows: Sequence[common.Record], name: str) -> str:
    """A row a method, a column a cut."""
    mine = {(row["method"], row["cut"]): row for row in rows}
    lines = []
    for method, chosen in METHODS.items():
        cells = [cell(mine.get((method, cut)), name) for cut in CUTS]
        if any(cells):
            lines.append([chosen.label, *cells])
    return common.markdown_table(["", *CUTS], lines)


def slimming_story(rows: Sequence[common.Record]) -> str:
    """Collapse and recovery after a cut of 70 %, a row a network."""
    lines = []
    for network, chosen in NETWORKS.items():
        mine = {(r["method"], r["cut"]): r for r in rows if r["network"] == network}
        cut = mine.get(("slimming", "70 %"))
        if cut is None:
            continue
        lines.append(
            [
                chosen.label,
                cell(mine.get(("trained", "none")), "before"),
                cell(mine.get(("trained with the penalty", "none")), "before"),
                cell(cut, "before"),
                cell(cut, "after"),
                f"{100 * (1 - cut['parameters']):.0f} %",
            ]
        )
    # Liu et al. 2017 by their README: accuracies 93.77, 93.30, 32.54 and 93.78 %.
    lines.append(["published: VGG-19, CIFAR-10", "6.23", "6.70", "67.46", "6.22", "89 %"])
    head = ["", "no penalty", "penalty", "70 % of channels cut", "fine-tuned", "parameters gone"]
    return common.markdown_table(head, lines)


def tables(rows: Sequence[common.Record]) -> str:
    """Everything that goes into the README."""
    parts = ["### Network Slimming's story", "Test error [%]:", slimming_story(rows)]
    for network, chosen in NETWORKS.items():
        mine = [row for row in rows if row["network"] == network]
        plain = next((row for row in mine if row["method"] == "trained"), None)
        parts.append(f"### {chosen.label}")
        parts.append(f"Test error [%], mean ± standard error; as trained {cell(plain, 'before')}.")
        for moment, when in MOMENTS.items():
            parts += [f"{when[0].upper()}{when[1:]}:", table_of(mine, moment)]
        parts += ["FLOPs that are left, of 1:", table_of(mine, "flops")]
        parts += ["CPU seconds to choose and remove:", table_of(mine, "prune_seconds")]
    return "\n\n".join(parts)


def main() -> None:
    """Run what is missing, then write results.json and the tables."""
    stages = [(dense_jobs, train), (removal_jobs, remove)]
    common.run_study(__doc__, HERE, stages, summarise, tables, begin=data, networks=NETWORKS)


if __name__ == "__main__":
    main()
