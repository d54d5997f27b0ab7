"""Trained networks on Fashion-MNIST, pruned in one go by every score at five sparsities.

    python -m reference_runs.one_shot_fashion_mnist.run --workers 2

from the repository's root. Finished runs are kept in results.jsonl and trained networks in
checkpoints/, so the same command goes on where it was stopped. See the README beside this file.
"""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import nn

import sparsetrain as st
from reference_runs import _common as common
from reference_runs.one_shot_fashion_mnist.methods import METHODS, SCOPES, Batches, Case
from reference_runs.one_shot_fashion_mnist.networks import (
    HERE,
    NETWORKS,
    SPARSITIES,
    begin,
    data,
    sgd,
    trained,
)
from sparsetrain.scores.base import Scope
from sparsetrain.workbench import evaluate
from sparsetrain.workbench.training import EpochRecord

CALIBRATION, CALIBRATION_BATCH = 1024, 128  # training images, the same for every method and seed
FINE_TUNING_RATE = 0.01  # for one epoch, cosine to 0
#: Of a network's errors: the key in the results, and what the tables call it.
MOMENTS = {"before": "straight after pruning", "after": "after one epoch of fine-tuning"}
#: The sparsity of the table of seconds.
TIMED = 0.90


def calibration() -> Batches:
    """The first training images, in batches."""
    inputs = torch.split(data().train_x[:CALIBRATION], CALIBRATION_BATCH)
    labels = torch.split(data().train_y[:CALIBRATION], CALIBRATION_BATCH)
    return list(zip(inputs, labels, strict=True))


def error_of(model: nn.Module) -> float:
    """Test error as a fraction."""
    return round(1 - evaluate(model, data().test_x, data().test_y), 4)


def train(job: common.Record, report: common.Report) -> common.Record:
    """Train a dense network, once for all methods."""
    epochs = NETWORKS[job["network"]].epochs

    def tell(record: EpochRecord) -> None:
        report(job["key"], record.epoch, epochs, f"test {100 * record.test_accuracy:.1f} %")

    model = trained(job["network"], job["seed"], tell)
    named = {name: job[name] for name in ("network", "method", "seed")}
    return {**named, "epochs": epochs, "test_error": error_of(model)}


def prune(job: common.Record, report: common.Report) -> common.Record:
    """One method on one trained network; lists have a value for each of `sparsities`."""
    dense, points = trained(job["network"], job["seed"]), []
    for done, sparsity in enumerate(SPARSITIES):
        report(job["key"], done, len(SPARSITIES), f"{100 * sparsity:g} %")
        points.append(_point(job, copy.deepcopy(dense), sparsity))
    named = {name: job[name] for name in ("network", "method", "scope", "seed")}
    columns = {name: [point[name] for point in points] for name in points[0]}
    return {**named, "sparsities": list(SPARSITIES), **columns}


def _point(job: common.Record, model: nn.Module, sparsity: float) -> common.Record:
    """Error of a pruned network before and, at some sparsities, after fine-tuning."""
    scope: Scope = job["scope"]
    case = Case(model, sparsity, scope, calibration(), job["seed"])
    started = time.process_time()
    result = METHODS[job["method"]].prune(case)
    seconds = time.process_time() - started
    before, after = error_of(result.apply()), None
    if sparsity in NETWORKS[job["network"]].fine_tuned:
        after = _fine_tuned(result, job["seed"])
    weights = [model.get_parameter(name) for name in result.masks]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    kept = {f"kept {n}": round(float(m.float().mean()), 5) for n, m in result.masks.items()}
    return {
        "zeros": zeros / sum(weight.numel() for weight in weights),
        "before": before,
        "after": after,
        "prune_seconds": round(seconds, 3),
        **kept,
    }


def _fine_tuned(result: st.PruneResult, seed: int) -> float:
    """Test error after an epoch in which the zeros are held."""
    optimizer = result.hold(sgd(result.model, FINE_TUNING_RATE))
    trainer = begin(result.model, optimizer, 1, seed)
    for _ in trainer.run(trainer.steps_per_epoch):
        pass
    optimizer.finalize()  # what is measured is what a user is left with
    return error_of(result.model)


def dense_jobs(networks: Sequence[str], seeds: int) -> list[common.Record]:
    """Networks to train."""
    return [
        {"key": f"{network}-dense-{seed}", "network": network, "method": "dense", "seed": seed}
        for seed in range(seeds)
        for network in networks
    ]


def pruning_jobs(networks: Sequence[str], seeds: int) -> list[common.Record]:
    """All runs, those of the first seed first."""
    return [
        {
            "key": f"{network}-{name}-{scope}-{seed}",
            "network": network,
            "method": name,
            "scope": scope,
            "seed": seed,
        }
        for seed in range(seeds)
        for network in networks
        for name, method in METHODS.items()
        for scope in method.scopes
    ]


def summarise(runs: Sequence[common.Record]) -> list[common.Record]:
    """One row a network, method, scope and sparsity; errors in percent, None where not measured."""
    groups: dict[tuple[str, str, str, float], list[common.Record]] = defaultdict(list)
    for run in runs:
        if run["method"] == "dense":
            key = (run["network"], "dense", "", 0.0)
            groups[key].append({"before": run["test_error"], "after": None, "prune_seconds": 0.0})
            continue
        for place, sparsity in enumerate(run["sparsities"]):
            point = {name: run[name][place] for name in (*MOMENTS, "prune_seconds")}
            groups[run["network"], run["method"], run["scope"], sparsity].append(point)
    rows = []
    for (network, method, scope, sparsity), points in groups.items():
        row = {"network": network, "method": method, "scope": scope, "sparsity": sparsity}
        row["seeds"] = len(points)
        for moment in MOMENTS:
            errors = [100 * point[moment] for point in points if point[moment] is not None]
            row[moment] = round(common.mean(errors), 3) if errors else None
            row[f"{moment}_standard_error"] = round(common.standard_error(errors), 3)
        row["prune_seconds"] = round(common.mean([p["prune_seconds"] for p in points]), 3)
        rows.append(row)
    return rows


def cell(row: common.Record | None, moment: str) -> str:
    """Mean and standard error; empty where nothing was measured."""
    if row is None or row[moment] is None:
        return ""
    return f"{row[moment]:.2f} ± {row[f'{moment}_standard_error']:.2f}"


def table_of(rows: Sequence[common.Record], network: str, scope: Scope, moment: str) -> str:
    """Errors of one network: a row a method, a column a sparsity."""
    mine = {(r["method"], r["sparsity"]): r for r in rows if r["scope"] == scope}
    columns = SPARSITIES if moment == "before" else NETWORKS[network].fine_tuned
    lines = []
    for name, method in METHODS.items():
        cells = [cell(mine.get((name, sparsity)), moment) for sparsity in columns]
        if any(cells):
            lines.append([method.label, *cells])
    return common.markdown_table(["", *(f"{100 * s:g} %" for s in columns)], lines)


def seconds_of(rows: Sequence[common.Record]) -> str:
    """CPU time of choosing the masks, a column a network."""
    networks = [n for n in NETWORKS if any(row["network"] == n for row in rows)]
    lines = []
    for name, method in METHODS.items():
        cells = []
        for network in networks:
            key = (network, name, TIMED)
            found = [
                row["prune_seconds"]
                for row in rows
                if (row["network"], row["method"], row["sparsity"]) == key
            ]
            cells.append(f"{common.mean(found):.2f}" if found else "")
        if any(cells):
            lines.append([method.label, *cells])
    return common.markdown_table(["[s]", *(NETWORKS[n].label for n in networks)], lines)


def tables(rows: Sequence[common.Record]) -> str:
    """Everything that goes into the README."""
    parts = []
    for network, chosen in NETWORKS.items():
        mine = [row for row in rows if row["network"] == network]
        dense = next((row for row in mine if row["method"] == "dense"), None)
        if dense is None:
            continue
        parts.append(f"### {chosen.label}")
        words = f"Test error [%], mean ± standard error; dense {cell(dense, 'before')}."
        parts.append(words)
        for scope, title in SCOPES.items():
            for moment, when in MOMENTS.items():
                parts.append(f"{title[0].upper()}{title[1:]}, {when}:")
                parts.append(table_of(mine, network, scope, moment))
    parts.append("### CPU seconds")
    parts.append(f"To choose the masks at {100 * TIMED:g} %:")
    parts.append(seconds_of(rows))
    return "\n\n".join(parts)


def main() -> None:
    """Run what is missing, then write results.json and the tables."""
    stages = [(dense_jobs, train), (pruning_jobs, prune)]
    common.run_study(__doc__, HERE, stages, summarise, tables, begin=data, networks=NETWORKS)


if __name__ == "__main__":
    main()
