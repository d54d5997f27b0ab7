"""LeNet-300-100 and LeNet-5 on Fashion-MNIST: every learned mask at five sparsities.

    python -m reference_runs.learned_masks_fashion_mnist.run --workers 2

from the repository's root. Finished runs are kept in results.jsonl, so the same command goes on
where it was stopped. See the README beside this file.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparsetrain as st
from reference_runs import _common as common
from reference_runs.learned_masks_fashion_mnist import mnist
from reference_runs.learned_masks_fashion_mnist.methods import LEARNED, METHODS
from sparsetrain.workbench import Dataset, Trainer, build, load

HERE = Path(__file__).parent
SPARSITIES = (0.90, 0.95, 0.965, 0.98, 0.99)
#: Those that are held against dense training at less than 4 % of the weights.
AT_965 = ("hard_concrete", "variational_dropout", "variational_dropout_long")
#: Too long for more than one sparsity of one network.
LONG = "variational_dropout_long"
NETWORKS = {"lenet_300_100": "LeNet-300-100", "lenet_5": "LeNet-5"}
EPOCHS = {"lenet_300_100": 20, "lenet_5": 4}
BATCH = 100
#: Methods whose runs on LeNet-300-100 `lenet_fashion_mnist` has, and their names there.
FOUNDATION = {"dense": "dense", "static": "static_erk", "rigl": "rigl", "gradual": "gradual"}


@cache
def data() -> Dataset:
    """All 60,000 and 10,000 images, mean and standard deviation of the pixels taken out."""
    return load("fashion_mnist")


def begin(network: str, method: str, sparsity: float, seed: int, epochs: int) -> Trainer:
    """A run before its first step."""
    chosen, dataset = METHODS[method], data()
    steps = epochs * len(dataset.train_x) // BATCH
    model = build(network, in_shape=dataset.in_shape, classes=10, seed=seed)
    if network == "lenet_5":
        model.get_submodule("conv1").register_forward_hook(_channels_last)
    torch.manual_seed(seed)
    optimizer = chosen.optimizer(model.parameters(), network)
    if chosen.policy is not None:
        policy = chosen.policy(sparsity, steps)
        optimizer = st.SparseOptimizer(optimizer, model, policy, seed=seed)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    return Trainer(model, optimizer, dataset, batch_size=BATCH, seed=seed, scheduler=scheduler)


def _channels_last(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """The same numbers in the layout in which poolings are fast: a step takes 0.75 of the time."""
    return output.contiguous(memory_format=torch.channels_last)


def train(job: common.Record, report: common.Report) -> common.Record:
    """One run: test error after the last step and what is left of each layer."""
    epochs = job["epochs"]
    trainer = begin(job["network"], job["method"], job["sparsity"], job["seed"], epochs)
    steps = epochs * trainer.steps_per_epoch
    for record in trainer.run(steps):
        words = f"test {100 * record.test_accuracy:.1f} %"
        report(job["key"], record.epoch, epochs, words)
    curve = trainer.history.accuracies
    optimizer, model = trainer.optimizer, trainer.model
    densities: dict[str, float] = {}
    kept, total = 1, 1
    if isinstance(optimizer, st.SparseOptimizer):
        optimizer.finalize()  # what is counted is what a user is left with
        weights = {name: model.get_parameter(name) for name in optimizer.targets}
        densities = {n: round(float((w != 0).float().mean()), 5) for n, w in weights.items()}
        kept = sum(int((w != 0).sum()) for w in weights.values())
        total = sum(w.numel() for w in weights.values())
    final = st.workbench.training.evaluate(model, data().test_x, data().test_y)
    return {
        "network": job["network"],
        "method": job["method"],
        "asked": job["sparsity"],
        "sparsity": 1 - kept / total,
        "seed": job["seed"],
        "epochs": epochs,
        "test_error": 1 - final,
        "test_error_before_finalize": 1 - curve[-1],
        "best_test_error": 1 - max(curve),
        "train_loss": trainer.history.last.loss,
        "train_seconds": round(sum(record.seconds for record in trainer.history.records), 1),
        "densities": densities,
        "test_error_curve": [round(1 - accuracy, 4) for accuracy in curve],
    }


def jobs_of(
    networks: Sequence[str], methods: Sequence[str], seeds: int, sparsities: Sequence[float]
) -> list[common.Record]:
    """All runs, those of the first seed first."""
    jobs = []
    for network in networks:
        for seed in range(seeds):
            for method in methods:
                if network == "lenet_300_100" and method in FOUNDATION:
                    continue
                epochs = EPOCHS[network] * METHODS[method].longer
                for sparsity in (0.0,) if method == "dense" else sparsities:
                    if sparsity == 0.965 and method not in AT_965:
                        continue
                    if method == LONG and (network, sparsity) != ("lenet_300_100", 0.965):
                        continue
                    jobs.append(
                        {
                            "key": f"{network}-{method}-{sparsity}-{seed}",
                            "network": network,
                            "method": method,
                            "sparsity": sparsity,
                            "seed": seed,
                            "epochs": epochs,
                        }
                    )
    return jobs


def foundation() -> list[common.Record]:
    """Runs of LeNet-300-100 in `lenet_fashion_mnist`, at the sparsities of this grid.

    The recipe is the same: data, batches, SGD, cosine and epochs.
    """
    names = {name: method for method, name in FOUNDATION.items()}
    path = HERE.parent / "lenet_fashion_mnist" / "results.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    epochs = found["settings"]["epochs"]
    if epochs != EPOCHS["lenet_300_100"]:
        raise ValueError(f"the runs in {path.parent.name} have {epochs} epochs: not comparable")
    return [
        {
            "network": "lenet_300_100",
            "method": names[run["method"]],
            "asked": run["sparsity"],
            "sparsity": run["sparsity"],
            "seed": run["seed"],
            "epochs": epochs,
            "test_error": run["test_error"],
            "densities": run["densities"] or {},
            "from": path.parent.name,
        }
        for run in found["runs"]
        if run["method"] in names and run["sparsity"] in (0.0, *SPARSITIES)
    ]


def summarise(runs: list[common.Record]) -> list[common.Record]:
    """One row a network, method and sparsity; errors in percent."""
    groups: dict[tuple[str, str, float], list[common.Record]] = defaultdict(list)
    for run in runs:
        groups[run["network"], run["method"], run["asked"]].append(run)
    rows = []
    for (network, method, asked), mine in groups.items():
        errors = [100 * run["test_error"] for run in mine]
        misses = [100 * abs(run["sparsity"] - asked) for run in mine]
        layers = {
            name: round(common.mean([run["densities"][name] for run in mine]), 4)
            for name in mine[0]["densities"]
        }
        rows.append(
            {
                "network": network,
                "method": method,
                "asked": asked,
                "seeds": len(mine),
                "test_error": round(common.mean(errors), 3),
                "standard_error": round(common.standard_error(errors), 3),
                "largest_miss": round(max(misses), 3),
                "kept": round(1 - common.mean([run["sparsity"] for run in mine]), 5),
                "densities": layers,
                "from": mine[0].get("from"),
            }
        )
    return rows


def label_of(row: common.Record) -> str:
    """A method's name, with a star where its runs are not from here."""
    return METHODS[row["method"]].label + (r" \*" if row["from"] else "")


def table_of(rows: list[common.Record], network: str) -> str:
    """Errors of one network: a row a method, a column a sparsity that was asked for."""
    mine = {(row["method"], row["asked"]): row for row in rows if row["network"] == network}
    columns = [s for s in SPARSITIES if any(asked == s for _, asked in mine)]
    lines = []
    for method in METHODS:
        found = [mine.get((method, 0.0 if method == "dense" else s)) for s in columns]
        named = next((row for row in found if row), None)
        if named:
            cells = [
                f"{row['test_error']:.2f} ± {row['standard_error']:.2f}" if row else ""
                for row in found
            ]
            lines.append([label_of(named), *cells])
    return common.markdown_table(["", *(f"{100 * s:g} %" for s in columns)], lines)


def layers_of(rows: list[common.Record], network: str, asked: float) -> str:
    """What each method leaves of each layer at one sparsity, in percent."""
    mine = [r for r in rows if r["network"] == network and r["asked"] == asked]
    names = list(mine[0]["densities"]) if mine else []
    lines = [
        [label_of(row), *(f"{100 * row['densities'][n]:.2f}" for n in names)]
        for row in sorted(mine, key=lambda row: list(METHODS).index(row["method"]))
    ]
    return common.markdown_table(["kept [%]", *names], lines)


def write(runs: list[common.Record]) -> None:
    """results.json and the tables of the README."""
    runs = [*runs, *foundation()]
    rows = summarise(runs)
    common.write_json(
        HERE / "results.json", {"machine": common.machine(), "table": rows, "runs": runs}
    )
    parts = []
    for network, label in NETWORKS.items():
        if not any(row["network"] == network for row in rows):
            continue
        longest = EPOCHS[network] * METHODS["variational_dropout"].longer
        epochs = f"{EPOCHS[network]} epochs (variational dropout {longest})"
        parts += [f"{label}, test error [%], mean ± standard error, {epochs}:", ""]
        parts += [table_of(rows, network), ""]
        parts += [f"{label}, what is left of each layer at 95 %:", ""]
        parts += [layers_of(rows, network, 0.95), ""]
    if any(row["from"] for row in rows):
        parts += [
            r"\* from [`lenet_fashion_mnist`](../lenet_fashion_mnist/README.md), the same recipe "
            "on the same network.",
            "",
        ]
    learned = [row for row in rows if row["method"] in LEARNED]
    if learned:
        parts.append(
            f"Of all {sum(row['seeds'] for row in learned)} runs with learned masks the one "
            "farthest from the sparsity it was asked for missed it by "
            f"{max(row['largest_miss'] for row in learned):.2f} percentage points."
        )
    common.put_into(HERE / "README.md", "\n".join(parts))


def main() -> None:
    """Run what is missing, then write results.json and the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--sparsities", nargs="+", type=float, default=list(SPARSITIES))
    parser.add_argument("--only-write", action="store_true", help="tables of the finished runs")
    parser.add_argument("--mnist", action="store_true", help="the runs of mnist.py, nothing else")
    arguments = parser.parse_args()
    if arguments.mnist:
        mnist.run(arguments.workers, arguments.seeds, only_write=arguments.only_write)
        return
    log = common.ResultLog(HERE / "results.jsonl")
    if not arguments.only_write:
        data()
        jobs = jobs_of(arguments.networks, arguments.methods, arguments.seeds, arguments.sparsities)
        common.run_jobs(jobs, train, log, workers=arguments.workers)
    runs: list[dict[str, Any]] = log.read()
    write(runs)


if __name__ == "__main__":
    main()
