"""Movement against magnitude pruning while a pretrained transformer is fine-tuned.

    python -m reference_runs.movement_minilm.run --workers 2

from the repository's root. Finished runs are kept in results-STEPS.jsonl, so the same command
goes on where it was stopped. See the README beside this file.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparsetrain as st
from reference_runs import _common as common
from reference_runs.movement_minilm import data
from reference_runs.movement_minilm.model import ENCODER, pretrained
from reference_runs.movement_minilm.tables import (
    KEPT,
    LABELS,
    ONE_SEED,
    SPARSE,
    advantages,
    summarise,
    tables,
)

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Settings:
    """One training recipe for every method."""

    steps: int = 600
    batch_size: int = 32
    learning_rate: float = 3e-4  # AdamW without weight decay; warm-up, then linear to 0
    warm_up: float = 0.05  # of the steps
    largest_gradient: float = 1.0  # norm over all weights, as in the paper
    mask_lr: float = 2e-2  # of movement's scores
    prune_from: float = 0.1  # of the steps; the kept share falls along a cubic
    prune_to: float = 0.7
    prune_every: int = 4


# What is compared.


def policy(method: str, kept: float, settings: Settings) -> st.Policy:
    """The policy of a sparse method."""
    share: dict[str, Any] = {"sparsity": 1 - kept, "total_steps": settings.steps}
    update = st.UpdateSchedule(
        every=settings.prune_every,
        start=round(settings.prune_from * settings.steps),
        stop=settings.prune_to,
    )
    if method == "movement":
        return st.Movement(
            **share,
            update=update,
            mode="threshold",
            allocation=st.Global(),
            mask_lr=settings.mask_lr,
        )
    if method == "hard_movement":
        return st.Movement(**share, update=update, mode="top_k", mask_lr=settings.mask_lr)
    allocation = st.Global() if method == "gradual_global" else st.Uniform()
    return st.Gradual(**share, update=update, score=st.Magnitude(), allocation=allocation)


def recipe(method: str, kept: float, settings: Settings) -> st.Recipe:
    """Linear weights of the encoder are pruned; the classifier stays dense."""
    pruned = st.Rule(match=ENCODER, policy=policy(method, kept, settings))
    return st.Recipe(rules=(pruned,))


# Training.


def rate(step: int, settings: Settings) -> float:
    """Learning rate as a share of its peak."""
    warm_up = settings.warm_up * settings.steps
    rising = (step + 1) / max(warm_up, 1)
    return min(rising, (settings.steps - step) / max(settings.steps - warm_up, 1))


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: Settings,
    seed: int,
    report: Callable[[int, int, str], None],
) -> tuple[list[float], float]:
    """Train; the mean loss of every tenth of the steps, and the seconds that it took."""
    train = data.load().train
    weights = optimizer.param_groups[0]["params"]  # the scores of movement are the other group
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(rate, settings=settings))
    order = torch.Generator().manual_seed(seed)
    samples = data.batches(train.lengths, settings.batch_size, settings.steps, order)
    model.train()
    losses: list[float] = []
    started = time.perf_counter()
    for step, batch in enumerate(samples, start=1):
        tokens, labels = data.trimmed(train, batch)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens), labels)
        loss.backward()
        if isinstance(optimizer, st.SparseOptimizer):
            optimizer.mask_gradients()  # so that clipping sees no pruned weights
        nn.utils.clip_grad_norm_(weights, settings.largest_gradient)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        if step % 10 == 0:
            report(step, settings.steps, f"loss {common.mean(losses[-50:]):.2f}")
    seconds = time.perf_counter() - started
    tenth = max(settings.steps // 10, 1)
    return [round(common.mean(losses[i : i + tenth]), 4) for i in range(0, len(losses), tenth)], (
        seconds
    )


@torch.inference_mode()
def accuracy(score: Callable[[Tensor], Tensor], split: data.Split) -> float:
    """Share of descriptions that are put into their section."""
    right = 0
    for batch in split.lengths.argsort(stable=True).split(128):
        tokens, labels = data.trimmed(split, batch)
        right += int((score(tokens).argmax(1) == labels).sum())
    return right / len(split)


def fine_tune(job: common.Record, report: common.Report) -> common.Record:
    """One run: accuracy of the finished model on the test set, and seconds."""
    settings, method, seed = Settings(**job["settings"]), job["method"], job["seed"]
    task = data.load()
    model = pretrained(len(task.classes), seed)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=settings.learning_rate,
        weight_decay=0.0,
        fused=True,
    )
    chosen = None if method == "dense" else recipe(method, job["kept"], settings)
    if chosen is not None:
        optimizer = st.SparseOptimizer(optimizer, model, chosen, seed=seed)
    losses, seconds = fit(model, optimizer, settings, seed, partial(report, job["key"]))
    names = []
    if isinstance(optimizer, st.SparseOptimizer):
        names = list(optimizer.targets)
        optimizer.finalize()
    model.eval()
    return {
        "method": method,
        "kept": job["kept"],
        "seed": seed,
        "test_accuracy": accuracy(model, task.test),
        "losses": losses,
        "step_seconds": round(seconds / settings.steps, 4),
        "densities": {name: _density(model, name) for name in names} or None,
        "recipe": chosen and chosen.to_dict(),
        "settings": job["settings"],
        "data": task.digest,
    }


def _density(model: nn.Module, name: str) -> float:
    weight = model.get_parameter(name)
    return round(int(weight.count_nonzero()) / weight.numel(), 5)


def bag(job: common.Record, report: common.Report) -> common.Record:
    """Logistic regression on word pieces, trained on everything: what needs no encoder at all."""
    task, epochs, size = data.load(), 8, 128
    torch.manual_seed(job["seed"])
    pieces = int(max(task.train.tokens.max(), task.test.tokens.max())) + 1
    model = nn.EmbeddingBag(pieces, len(task.classes), mode="sum", padding_idx=data.PAD)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    steps = epochs * (len(task.train) // size)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    order = torch.Generator().manual_seed(job["seed"])
    started = time.perf_counter()
    for step, batch in enumerate(data.batches(task.train.lengths, size, steps, order), start=1):
        tokens, labels = data.trimmed(task.train, batch)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens), labels).backward()
        optimizer.step()
        scheduler.step()
        if step % 100 == 0:
            report(job["key"], step, steps, "")
    return {
        "method": "bag",
        "kept": job["kept"],
        "seed": job["seed"],
        "test_accuracy": accuracy(model, task.test),
        "step_seconds": round((time.perf_counter() - started) / steps, 4),
        "settings": job["settings"],
        "data": task.digest,
    }


def train(job: common.Record, report: common.Report) -> common.Record:
    """Any run of the grid."""
    return bag(job, report) if job["method"] == "bag" else fine_tune(job, report)


def jobs(
    settings: Settings, methods: list[str], kept: dict[float, int], seeds: list[int]
) -> list[common.Record]:
    """Every run of the grid; whole seeds come first, so that a stopped grid is still a table.

    Args:
        kept: share kept -> how many of the seeds it is run with.
    """
    return [
        {
            "key": f"{method}-{100 * share:g}-{seed}",
            "method": method,
            "kept": share,
            "seed": seed,
            "settings": asdict(settings),
        }
        for number, seed in enumerate(seeds)
        for method in methods
        for share, wanted in (kept if method in SPARSE else {1.0: len(seeds)}).items()
        if number < (1 if method in ONE_SEED else wanted)
    ]


def main() -> None:
    """Run what is missing, then write results.json and the tables in the README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--learning-rate", type=float, default=Settings.learning_rate)
    parser.add_argument("--methods", nargs="+", choices=list(LABELS), default=list(LABELS))
    parser.add_argument("--kept", nargs="+", type=float, help="every seed of these shares alone")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the results")
    arguments = parser.parse_args()
    settings = Settings(steps=arguments.steps, learning_rate=arguments.learning_rate)
    task = data.load()  # a missing package list is told once, here
    kept = dict.fromkeys(arguments.kept, len(arguments.seeds)) if arguments.kept else KEPT
    grid = jobs(settings, arguments.methods, kept, arguments.seeds)
    log = common.ResultLog(arguments.out / f"results-{settings.steps}.jsonl")
    common.run_jobs(grid, train, log, workers=arguments.workers)
    runs = log.read()  # those of earlier calls too, which may have had other methods or seeds
    common_ground = (asdict(settings), task.digest)
    if stale := [run["key"] for run in runs if (run["settings"], run["data"]) != common_ground]:
        raise SystemExit(
            f"{log.path.name} has runs with other settings or package lists, {', '.join(stale)}: "
            "move it away, or give another --out"
        )
    rows, gaps = summarise(runs), advantages(runs)
    result = {
        "experiment": "MiniLM (6 layers) fine-tuned to tell the section of Debian packages",
        "settings": asdict(settings),
        "data": {
            "digest": task.digest,
            "train": len(task.train),
            "test": len(task.test),
            "classes": task.classes,
        },
        "machine": {**common.machine(), "threads": "1 a run", "workers": arguments.workers},
        "table": rows,
        "advantages": gaps,
        "runs": [{key: run[key] for key in run if key != "settings"} for run in runs],
    }
    common.write_json(arguments.out / "results.json", result)
    common.console.print(tables(rows, gaps), soft_wrap=True, markup=False)
    if arguments.out == HERE:
        common.put_into(HERE / "README.md", tables(rows, gaps))


if __name__ == "__main__":
    main()
