"""LeNet-300-100 on all of Fashion-MNIST: seven sparse methods at four sparsities, and dense.

    python -m reference_runs.lenet_fashion_mnist.run --workers 2

from the repository's root. Finished runs are kept in results-EPOCHS.jsonl, so the same command
goes on where it was stopped. See the README beside this file.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

import sparsetrain as st
from reference_runs import _common as common
from reference_runs.lenet_fashion_mnist.methods import LABELS, SPARSE, policy
from sparsetrain.workbench import Dataset, Trainer, build, load

HERE = Path(__file__).parent
SPARSITIES = (0.90, 0.95, 0.98, 0.99)
#: (better, worse): what the field agrees on for high sparsity.
EXPECTED = (
    ("rigl", "set"),
    ("snfs", "set"),
    ("set", "static_erk"),
    ("static_erk", "static_uniform"),
    ("gradual", "rigl"),
)


@dataclass(frozen=True)
class Settings:
    """One training recipe for every method."""

    epochs: int = 20
    batch_size: int = 100
    learning_rate: float = 0.1  # cosine to 0, a value a step
    momentum: float = 0.9  # Nesterov's
    weight_decay: float = 1e-4


@cache
def data() -> Dataset:
    """All 60,000 and 10,000 images, mean and standard deviation of the pixels taken out."""
    return load("fashion_mnist")


def steps_of(settings: Settings) -> int:
    """Optimizer steps of a run."""
    return settings.epochs * (len(data().train_x) // settings.batch_size)


def begin(
    settings: Settings, seed: int, chosen: st.Policy | None, storage: str = "masked"
) -> Trainer:
    """A run before its first step; `chosen` is the policy, None for dense training."""
    dataset, steps = data(), steps_of(settings)
    model = build("lenet_300_100", in_shape=dataset.in_shape, classes=10, seed=seed)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(
        model.parameters(),
        lr=settings.learning_rate,
        momentum=settings.momentum,
        nesterov=True,
        weight_decay=settings.weight_decay,
    )
    if chosen is not None:
        optimizer = st.SparseOptimizer(optimizer, model, chosen, seed=seed, storage=storage)
    return Trainer(
        model,
        optimizer,
        dataset,
        batch_size=settings.batch_size,
        seed=seed,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
    )


def train(job: common.Record, report: common.Report) -> common.Record:
    """One run: test error after the last step, seconds and FLOPs."""
    settings = Settings(**job["settings"])
    steps = steps_of(settings)
    trainer = begin(settings, job["seed"], policy(job["method"], job["sparsity"], steps))
    for record in trainer.run(steps):
        words = f"test {100 * record.test_accuracy:.1f} %"
        report(job["key"], record.epoch, settings.epochs, words)
    curve = trainer.history.accuracies
    result = {
        "method": job["method"],
        "sparsity": job["sparsity"],
        "seed": job["seed"],
        "steps": trainer.step,
        "test_error": 1 - curve[-1],
        "best_test_error": 1 - max(curve),
        "train_loss": trainer.history.last.loss,
        "train_seconds": round(sum(record.seconds for record in trainer.history.records), 2),
        "test_error_curve": [round(1 - accuracy, 4) for accuracy in curve],
    }
    return {**result, **_cost(trainer.model, trainer.optimizer, data())}


def _cost(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, dataset: Dataset
) -> common.Record:
    if not isinstance(optimizer, st.SparseOptimizer):
        return {"training_flops": 1.0, "inference_flops": 1.0, "densities": None, "recipe": None}
    counted = st.cost.training_flops(optimizer, model, dataset.test_x[:1])
    recipe = optimizer.recipe.to_dict()
    densities = {name: round(t.density, 5) for name, t in optimizer.targets.items()}
    optimizer.finalize()
    zeros = sum(int((model.get_parameter(name) == 0).sum()) for name in densities)
    return {
        "training_flops": round(counted.training_multiple, 4),
        "inference_flops": round(counted.inference_multiple, 4),
        "zeros": zeros,
        "densities": densities,
        "recipe": recipe,
    }


def summarise(runs: list[common.Record]) -> list[common.Record]:
    """One row a method and sparsity; errors in percent, FLOPs as multiples of dense."""
    groups: dict[tuple[str, float], list[common.Record]] = defaultdict(list)
    for run in runs:
        groups[run["method"], run["sparsity"]].append(run)
    rows = []
    for (method, sparsity), mine in sorted(groups.items(), key=_table_order):
        errors = [100 * run["test_error"] for run in mine]
        rows.append(
            {
                "method": method,
                "sparsity": sparsity,
                "seeds": len(mine),
                "test_error": round(common.mean(errors), 3),
                "standard_error": round(common.standard_error(errors), 3),
                "training_flops": round(common.mean([r["training_flops"] for r in mine]), 4),
                "inference_flops": round(common.mean([r["inference_flops"] for r in mine]), 4),
                "train_seconds": round(common.mean([r["train_seconds"] for r in mine]), 1),
            }
        )
    return rows


def _table_order(item: tuple[tuple[str, float], Any]) -> tuple[int, float]:
    (method, sparsity), _ = item
    return list(LABELS).index(method), sparsity


def orderings(runs: list[common.Record]) -> list[common.Record]:
    """Differences of test error between methods, paired by seed, in percentage points."""
    errors = {(r["method"], r["sparsity"], r["seed"]): 100 * r["test_error"] for r in runs}
    seeds = sorted({run["seed"] for run in runs})
    rows = []
    for better, worse in EXPECTED:
        for sparsity in SPARSITIES:
            pairs = [
                errors[worse, sparsity, seed] - errors[better, sparsity, seed]
                for seed in seeds
                if {(worse, sparsity, seed), (better, sparsity, seed)} <= errors.keys()
            ]
            if pairs:
                names = {"better": better, "worse": worse, "sparsity": sparsity}
                rows.append({**names, **common.advantage(pairs)})
    return rows


def tables(rows: list[common.Record], gaps: list[common.Record]) -> str:
    """Errors, costs and orderings as Markdown."""
    found = {(row["method"], row["sparsity"]): row for row in rows}
    present = [method for method in LABELS if any(row["method"] == method for row in rows)]
    head = [f"{100 * sparsity:g} %" for sparsity in SPARSITIES]

    def line(method: str, write: Any) -> list[str]:
        """Cells of a method; dense has one value for all sparsities."""
        cells = []
        for sparsity in SPARSITIES:
            row = found.get((method, 0.0 if method == "dense" else sparsity))
            cells.append(write(row) if row else "")
        return [LABELS[method], *cells]

    def error(row: common.Record) -> str:
        return f"{row['test_error']:.2f} ± {row['standard_error']:.2f}"

    def cost(row: common.Record) -> str:
        return f"{row['training_flops']:.3f} / {row['inference_flops']:.3f}"

    parts = []
    for title, write in (
        ("Test error [%] at the end of training, mean ± standard error", error),
        ("FLOPs as a multiple of dense: training / inference", cost),
    ):
        lines = [line(method, write) for method in present]
        parts.append(f"{title}:\n\n" + common.markdown_table(["", *head], lines))
    by_pair = {(gap["better"], gap["worse"], gap["sparsity"]): gap for gap in gaps}
    lines = []
    for better, worse in EXPECTED:
        cells = []
        for sparsity in SPARSITIES:
            gap = by_pair.get((better, worse, sparsity))
            cells.append(f"{gap['advantage']:+.2f} ± {gap['standard_error']:.2f}" if gap else "")
        lines.append([f"{LABELS[better]} over {LABELS[worse]}", *cells])
    title = "Advantage in test error [percentage points], paired by seed (positive as expected)"
    parts.append(f"{title}:\n\n" + common.markdown_table(["", *head], lines))
    return "\n\n".join(parts)


def jobs(
    settings: Settings, methods: list[str], sparsities: list[float], seeds: int
) -> list[common.Record]:
    """Every run of the grid; whole seeds come first, so that a stopped grid is still a table."""
    grid = []
    for seed in range(seeds):
        for method in methods:
            for sparsity in [0.0] if method == "dense" else sparsities:
                grid.append(
                    {
                        "key": f"{method}-{100 * sparsity:g}-{seed}",
                        "method": method,
                        "sparsity": sparsity,
                        "seed": seed,
                        "settings": asdict(settings),
                    }
                )
    return grid


def main() -> None:
    """Run what is missing, then write results.json and the tables in the README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20, help="600 steps each")
    names = ["dense", *SPARSE]
    parser.add_argument("--methods", nargs="+", choices=names, default=names)
    parser.add_argument("--sparsities", nargs="+", type=float, default=list(SPARSITIES))
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the results")
    arguments = parser.parse_args()
    settings = Settings(epochs=arguments.epochs)
    data()  # a missing data set is told once, here
    grid = jobs(settings, arguments.methods, arguments.sparsities, arguments.seeds)
    log = common.ResultLog(arguments.out / f"results-{settings.epochs}.jsonl")
    common.run_jobs(grid, train, log, workers=arguments.workers)
    runs = log.read()  # those of earlier calls too, which may have had other methods or seeds
    rows, gaps = summarise(runs), orderings(runs)
    result = {
        "experiment": "LeNet-300-100 on Fashion-MNIST, 60,000 / 10,000 images",
        "settings": asdict(settings),
        "machine": {**common.machine(), "threads": "1 a run", "workers": arguments.workers},
        "table": rows,
        "orderings": gaps,
        "runs": runs,
    }
    common.write_json(arguments.out / "results.json", result)
    common.console.print(tables(rows, gaps), soft_wrap=True, markup=False)
    if arguments.out == HERE:
        common.put_into(HERE / "README.md", tables(rows, gaps))


if __name__ == "__main__":
    main()
