"""One training run in a folder: its settings, checkpoint, metrics, result. Can be resumed.

The folder holds `run.json` (settings and versions), `checkpoint.pt` (after each epoch),
`metrics.jsonl` (one line an epoch), `events.jsonl` and `ages.jsonl` (one line a mask update), and
in the end `model.pt` (a plain state dict with exact zeros) and `summary.json`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch.optim import Optimizer

from sparsetrain.config import Config
from sparsetrain.cost import training_flops
from sparsetrain.keeping import whole_file
from sparsetrain.optimizer import SparseOptimizer
from sparsetrain.recipe import Recipe
from sparsetrain.report.ages import MaskAges
from sparsetrain.report.events import UpdateEvent
from sparsetrain.report.run_page import event_from
from sparsetrain.workbench.data import Dataset, load
from sparsetrain.workbench.environment import environment
from sparsetrain.workbench.networks import build
from sparsetrain.workbench.training import EpochRecord, Trainer, evaluate


class RunConfig(Config):
    """Everything that decides a run's result, beside the versions of the software."""

    recipe: dict[str, Any] | None = Field(description="the recipe; None trains a dense network")
    data: str = Field("digits", description="name of the data set")
    network: str = Field("lenet_300_100", description="name of the network")
    epochs: int = Field(20, ge=1, description="passes over the training data")
    batch_size: int = Field(128, ge=1, description="samples a step")
    lr: float = Field(0.1, gt=0, description="learning rate at the first step")
    lr_schedule: Literal["constant", "cosine"] = Field(
        "cosine", description="learning rate over the steps; cosine ends at zero"
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of SGD")
    weight_decay: float = Field(5e-4, ge=0, description="weight decay of SGD")
    storage: Literal["masked", "csr", "auto"] = Field(
        "masked", description="how sparse weights are held"
    )
    seed: int = Field(0, ge=0, description="of the weights, the masks and the order of samples")


@dataclass
class _Parts:
    """What a run works with."""

    trainer: Trainer
    sparse: SparseOptimizer | None
    ages: MaskAges | None
    events: list[UpdateEvent]


def train(
    config: RunConfig,
    out: Path,
    *,
    root: Path | None = None,
    resume: bool = False,
    on_step: Callable[[int, int], None] | None = None,
    on_epoch: Callable[[EpochRecord], None] | None = None,
) -> dict[str, Any]:
    """Train as `config` says, keep everything in the folder `out` and return the summary.

    With `resume` an interrupted run in `out` goes on after its last whole epoch and ends bit for
    bit where it would have ended without the interruption. `on_step` is told the steps done and
    the steps in all. Raises ValueError when `out` holds a run already (without `resume`), holds
    none or another one (with it), when the recipe's `total_steps` are not the steps of this run,
    or when recipe, network and data do not fit together.
    """
    _check_folder(config, out, resume)
    dataset = load(config.data, root=root)
    steps = config.epochs * math.ceil(len(dataset.train_x) / config.batch_size)
    recipe = None if config.recipe is None else Recipe.from_dict(config.recipe)
    if recipe is not None:
        check_total_steps(recipe, steps, epochs=config.epochs)
    torch.manual_seed(config.seed)
    parts = _assemble(config, recipe, dataset, steps)
    if on_step is not None:
        report_step = on_step
        parts.trainer.on_step = lambda done: report_step(done, steps)
    _start_folder(config, out, parts)
    for record in parts.trainer.run(steps):
        _save_checkpoint(out, parts)
        _write_logs(out, parts)
        if on_epoch is not None:
            on_epoch(record)
    return _finish(config, out, parts)


def check_total_steps(recipe: Recipe, steps: int, *, epochs: int) -> None:
    """ValueError when a policy of the recipe plans for another number of steps than there are."""
    policies = {"policy": recipe.policy}
    policies |= {f"rules[{number}].policy": r.policy for number, r in enumerate(recipe.rules)}
    for place, policy in policies.items():
        planned = getattr(policy, "total_steps", None)
        if planned is not None and planned != steps:
            raise ValueError(
                f"{place} of the recipe has total_steps {planned}, but {epochs} epochs of "
                f"{steps // epochs} steps are {steps}: write total_steps: {steps} there, or choose "
                "other epochs or another batch size"
            )


def _check_folder(config: RunConfig, out: Path, resume: bool) -> None:
    settings = out / "run.json"
    if not resume:
        if settings.exists():
            raise ValueError(f"{out} holds a run already: resume it, or choose another folder")
        return
    if not settings.exists():
        raise ValueError(f"{out} holds no run to resume")
    earlier = json.loads(settings.read_text(encoding="utf-8"))["config"]
    for name, value in config.model_dump(mode="json").items():
        if earlier.get(name) != value:
            raise ValueError(
                f"the run in {out} has {name} {earlier.get(name)!r}, not {value!r}: resume with "
                "the same settings, or start a new run in another folder"
            )


def _assemble(config: RunConfig, recipe: Recipe | None, dataset: Dataset, steps: int) -> _Parts:
    model = build(
        config.network, in_shape=dataset.in_shape, classes=dataset.classes, seed=config.seed
    )
    optimizer: Optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    scheduler = None
    if config.lr_schedule == "cosine":
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    sparse, ages = None, None
    events: list[UpdateEvent] = []
    if recipe is not None:
        sparse = SparseOptimizer(optimizer, model, recipe, seed=config.seed, storage=config.storage)
        sparse.register_update_hook(events.append)
        ages = MaskAges(sparse)
    trainer = Trainer(
        model,
        sparse or optimizer,
        dataset,
        batch_size=config.batch_size,
        seed=config.seed,
        scheduler=scheduler,
    )
    return _Parts(trainer, sparse, ages, events)


def _start_folder(config: RunConfig, out: Path, parts: _Parts) -> None:
    """Open the folder, or take over what an interrupted run left in it."""
    out.mkdir(parents=True, exist_ok=True)
    if (out / "checkpoint.pt").exists():
        saved = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True)
        parts.trainer.load_state_dict(saved["trainer"])
        parts.events.extend(event_from(event) for event in saved["events"])
        if parts.ages is not None:
            parts.ages.load_state_dict(saved["ages"])
    settings = {"config": config.model_dump(mode="json"), "environment": environment()}
    _write(out / "run.json", json.dumps(settings, indent=2) + "\n")
    _write_logs(out, parts)


def _save_checkpoint(out: Path, parts: _Parts) -> None:
    state = {
        "trainer": parts.trainer.state_dict(),
        "events": [event.to_dict() for event in parts.events],
        "ages": None if parts.ages is None else parts.ages.state_dict(),
    }
    with whole_file(out / "checkpoint.pt") as partial:
        torch.save(state, partial)


def _write_logs(out: Path, parts: _Parts) -> None:
    # Written anew each time, so that lines after the last checkpoint of an interrupted run go.
    _write_lines(out / "metrics.jsonl", parts.trainer.history.to_list())
    if parts.ages is not None:
        _write_lines(out / "events.jsonl", (event.to_dict() for event in parts.events))
        _write_lines(out / "ages.jsonl", parts.ages.state_dict()["records"])


def _finish(config: RunConfig, out: Path, parts: _Parts) -> dict[str, Any]:
    trainer, model = parts.trainer, parts.trainer.model
    summary: dict[str, Any] = {
        "method": _method(config),
        "epochs": config.epochs,
        "steps": trainer.step,
        "seconds": sum(record.seconds for record in trainer.history.records),
    }
    if parts.sparse is not None:
        flops = training_flops(parts.sparse, model, trainer.dataset.train_x[:1])
        summary["sparsity"] = parts.sparse.sparsity()
        summary["training_multiple"] = flops.training_multiple
        summary["inference_multiple"] = flops.inference_multiple
        summary["layers"] = {
            name: {"shape": list(target.shape), "active": target.active, "total": target.numel}
            for name, target in parts.sparse.targets.items()
        }
        parts.sparse.finalize()
    dataset = trainer.dataset
    summary["test_accuracy"] = evaluate(model, dataset.test_x, dataset.test_y)
    summary["best_test_accuracy"] = max(trainer.history.accuracies)
    torch.save(model.state_dict(), out / "model.pt")
    _write(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def _method(config: RunConfig) -> str:
    if config.recipe is None:
        return "dense"
    policy = Recipe.from_dict(config.recipe).policy
    return "several policies" if policy is None else policy.kind


def _write_lines(path: Path, objects: Iterable[dict[str, Any]]) -> None:
    _write(path, "".join(json.dumps(value) + "\n" for value in objects))


def _write(path: Path, text: str) -> None:
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
