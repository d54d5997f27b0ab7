r"""Variational dropout and L0 on MNIST with the settings of their papers, beside their tables.

    SPARSETRAIN_DATA=... python -m reference_runs.learned_masks_fashion_mnist.mnist --workers 2

where that folder has the four IDX files of MNIST. Strengths are the papers' own; nothing is steered
to a sparsity. Finished runs are kept in mnist.jsonl. See the README beside this file.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import nn

import sparsetrain as st
from reference_runs import _common as common
from sparsetrain.workbench import Dataset, Trainer, build, load
from sparsetrain.workbench.training import evaluate

HERE = Path(__file__).parent
EPOCHS, BATCH, LEARNING_RATE = 200, 100, 1e-3
NETWORKS = {"lenet_300_100": "LeNet-300-100", "lenet_5": "LeNet-5"}
METHODS = {"variational_dropout": "Variational dropout", "l0": "L0, hard concrete"}


@dataclass(frozen=True)
class Published:
    """What the paper's table says: test error [%], and compression or the units that are left."""

    test_error: float
    compression: float | None = None
    architecture: str = ""


# Molchanov et al. 2017, table 1; Louizos et al. 2018, table 1 (lambda = 0.1 / N).
PUBLISHED = {
    ("variational_dropout", "lenet_300_100"): Published(1.92, compression=68),
    ("variational_dropout", "lenet_5"): Published(0.75, compression=280),
    ("l0", "lenet_300_100"): Published(1.4, architecture="219-214-100"),
    ("l0", "lenet_5"): Published(0.9, architecture="20-25-45-462"),
}


@cache
def data(method: str) -> Dataset:
    """MNIST with pixels in [0, 1]; for variational dropout less the mean training image."""
    dataset = load("mnist", normalise=False)
    if method != "variational_dropout":
        return dataset
    mean = dataset.train_x.mean(0)
    return replace(dataset, train_x=dataset.train_x - mean, test_x=dataset.test_x - mean)


def variational_dropout(network: str, steps: int, examples: int) -> st.Policy:
    """The KL divergence counts from epoch 5 of 200 on, and fully from epoch 20."""
    return st.VariationalDropout(
        strength=1 / examples,
        total_steps=steps,
        update=st.UpdateSchedule(every=100, start=round(steps * 5 / EPOCHS)),
        warm_up=15 / EPOCHS,
        mask_lr=LEARNING_RATE,
    )


def l0(network: str, steps: int, examples: int) -> st.Recipe:
    """Gates for input units of dense layers and for feature maps of convolutions."""

    def gates(match: str, **options: object) -> dict[str, object]:
        policy = st.HardConcrete.model_validate(
            {
                "strength": 0.1 / examples,
                "total_steps": steps,
                "update": {"every": 100},
                "mask_lr": LEARNING_RATE,
                "drop_rate": 0.5,
                "per": "input",
                **options,
            }
        )
        return {"match": match, "policy": policy}

    if network == "lenet_300_100":
        rules = [gates("fc1.weight", drop_rate=0.2), gates("fc*.weight")]
    else:
        rules = [gates("conv*.weight", per="output"), gates("fc*.weight")]
    return st.Recipe.model_validate({"rules": rules})


POLICIES: dict[str, Callable[[str, int, int], st.Policy | st.Recipe]] = {
    "variational_dropout": variational_dropout,
    "l0": l0,
}


@torch.no_grad()
def initialise(model: nn.Module, method: str) -> None:
    """Weights as the authors' code starts them; biases are 0."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            if method == "variational_dropout":
                nn.init.normal_(module.weight, std=0.01)
            else:
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            assert module.bias is not None
            nn.init.zeros_(module.bias)


def rate(method: str, network: str, share: float) -> float:
    """Factor of the learning rate after this share of training."""
    if method == "l0":
        return 1.0
    start = 0.5 if network == "lenet_300_100" else 0.0
    return min(1.0, (1 - share) / (1 - start))


def begin(method: str, network: str, seed: int, epochs: int) -> Trainer:
    """A run before its first step."""
    dataset = data(method)
    examples = len(dataset.train_x)
    steps = epochs * -(-examples // BATCH)
    model = build(network, in_shape=dataset.in_shape, classes=10, seed=seed)
    torch.manual_seed(seed)
    initialise(model, method)
    base = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    policy = POLICIES[method](network, steps, examples)
    optimizer = st.SparseOptimizer(base, model, policy, seed=seed)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate(method, network, step / steps)
    )
    return Trainer(model, optimizer, dataset, batch_size=BATCH, seed=seed, scheduler=scheduler)


def train(job: common.Record, report: common.Report) -> common.Record:
    """One run: test error of the finalized network at the end, and what is left of it."""
    epochs = job["epochs"]
    trainer = begin(job["method"], job["network"], job["seed"], epochs)
    for record in trainer.run(epochs * trainer.steps_per_epoch):
        words = f"test {100 * record.test_accuracy:.2f} %, sparsity {100 * record.sparsity:.2f} %"
        report(job["key"], record.epoch, epochs, words)
    optimizer, model = trainer.optimizer, trainer.model
    assert isinstance(optimizer, st.SparseOptimizer)
    optimizer.finalize()
    weights = {name: p for name, p in model.named_parameters() if name.endswith("weight")}
    kept = sum(int((w != 0).sum()) for w in weights.values())
    curve = trainer.history.accuracies
    return {
        **{name: job[name] for name in ("method", "network", "seed", "epochs")},
        "examples": len(data(job["method"]).train_x),
        "test_error": 1 - evaluate(model, data(job["method"]).test_x, data(job["method"]).test_y),
        "best_test_error": 1 - max(curve),
        "compression": round(sum(w.numel() for w in weights.values()) / max(kept, 1), 2),
        "densities": {n: round(float((w != 0).float().mean()), 5) for n, w in weights.items()},
        "architecture": "-".join(str(units_of(n, w)) for n, w in weights.items()),
        "test_error_curve": [round(1 - accuracy, 4) for accuracy in curve],
    }


def units_of(name: str, weight: torch.Tensor) -> int:
    """Feature maps of a convolution, input units of a dense layer, that have a weight left."""
    unit = 0 if name.startswith("conv") else 1
    others = [d for d in range(weight.dim()) if d != unit]
    return int((weight != 0).sum(others).count_nonzero())


def table_of(runs: list[common.Record]) -> str:
    """Ours beside published."""
    lines = []
    for (method, network), published in PUBLISHED.items():
        mine = [r for r in runs if (r["method"], r["network"]) == (method, network)]
        if not mine:
            continue
        errors = [100 * run["test_error"] for run in mine]
        compression = f"{common.mean([run['compression'] for run in mine]):.0f}x"
        if published.compression:
            compression += f" / {published.compression:.0f}x"
        kept = ", ".join(
            f"{100 * common.mean([run['densities'][name] for run in mine]):.2f}"
            for name in mine[0]["densities"]
        )
        lines.append(
            [
                f"{METHODS[method]}, {NETWORKS[network]}",
                len(mine),
                f"{common.mean(errors):.2f} ± {common.standard_error(errors):.2f} / "
                f"{published.test_error:g}",
                compression,
                kept,
                f"{mine[0]['architecture']} / {published.architecture or 'not given'}",
            ]
        )
    head = [
        "ours / published",
        "seeds",
        "test error [%]",
        "compression",
        "kept of each layer [%]",
        "units left (first seed)",
    ]
    return common.markdown_table(head, lines)


def run(
    workers: int, seeds: int, *, epochs: int = EPOCHS, out: Path = HERE, only_write: bool = False
) -> None:
    """Run what is missing, then write mnist.json and, beside this file, the README's table.

    Raises SystemExit when MNIST is not on this machine and cannot be downloaded.
    """
    log = common.ResultLog(out / "mnist.jsonl")
    if not only_write:
        try:
            data("l0")
        except ValueError as error:
            raise SystemExit(f"no MNIST, no runs: {error}") from error
        jobs = [
            {
                "key": f"{method}-{network}-{epochs}-{seed}",
                "method": method,
                "network": network,
                "seed": seed,
                "epochs": epochs,
            }
            for seed in range(seeds)
            for method, network in PUBLISHED
        ]
        common.run_jobs(jobs, train, log, workers=workers)
    runs = [record for record in log.read() if record["epochs"] == epochs]
    common.write_json(out / "mnist.json", {"machine": common.machine(), "runs": runs})
    text = f"MNIST, {epochs} epochs (the papers: {EPOCHS}):\n\n{table_of(runs)}"
    common.console.print(text, soft_wrap=True, markup=False)
    if out == HERE:
        common.put_into(HERE / "README.md", text, section="mnist")


def main() -> None:
    """The four cells of the table, for each seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="fewer, to try it out")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the results")
    parser.add_argument("--only-write", action="store_true", help="tables of the finished runs")
    chosen = parser.parse_args()
    run(
        chosen.workers,
        chosen.seeds,
        epochs=chosen.epochs,
        out=chosen.out,
        only_write=chosen.only_write,
    )


if __name__ == "__main__":
    main()
