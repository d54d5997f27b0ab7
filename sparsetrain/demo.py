"""The demo: dense, static and RigL networks on handwritten digits, compared on one page."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from sparsetrain._threads import torch_threads
from sparsetrain.cost import training_flops
from sparsetrain.optimizer import SparseOptimizer
from sparsetrain.policies import Policy, RigL, Static
from sparsetrain.report import html, plots
from sparsetrain.report.ages import AgeRecord, MaskAges
from sparsetrain.workbench.data import Dataset, load
from sparsetrain.workbench.environment import environment
from sparsetrain.workbench.networks import build
from sparsetrain.workbench.training import EpochRecord, fit

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

SPARSITIES = (0.90, 0.95, 0.98)
METHODS = {"static": "static", "rigl": "RigL"}
COLUMNS = (
    "network",
    "sparsity",
    "test accuracy",
    "weights kept",
    "training FLOPs",
    "inference FLOPs",
)
_WIDTHS = (300, 100)
_BATCH_SIZE = 64
_LEARNING_RATE, _MOMENTUM, _WEIGHT_DECAY = 0.1, 0.9, 1e-4
_UPDATE_EVERY = 20


@dataclass(frozen=True)
class DemoRun:
    """One trained network. FLOPs are multiples of the dense network's; times are seconds."""

    method: str
    sparsity: float
    seed: int
    accuracy: float
    kept: int
    training_multiple: float
    inference_multiple: float
    densities: dict[str, float]
    ages: tuple[AgeRecord, ...]
    seconds: float


@dataclass(frozen=True)
class Demo:
    """All runs of the demo and how long they took, in seconds."""

    runs: tuple[DemoRun, ...]
    epochs: int
    seconds: float

    def of(self, method: str, sparsity: float) -> list[DemoRun]:
        """The runs of one method at one sparsity, one a seed."""
        return [run for run in self.runs if (run.method, run.sparsity) == (method, sparsity)]

    def rows(self) -> list[list[str]]:
        """The comparison as text, one row a network, in the order of `COLUMNS`."""
        rows = [_row("dense", "0 %", self.of("dense", 0.0))]
        for sparsity in SPARSITIES:
            for method, label in METHODS.items():
                rows.append(_row(label, f"{100 * sparsity:g} %", self.of(method, sparsity)))
        return rows

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table(title="Sparse training on handwritten digits", title_justify="left")
        for number, column in enumerate(COLUMNS):
            heading = column.replace(" FLOPs", "\nFLOPs")
            table.add_column(heading, justify="left" if number == 0 else "right", no_wrap=True)
        for number, row in enumerate(self.rows()):
            table.add_row(*row, end_section=number % len(METHODS) == 0)
        return table


def run_demo(
    *,
    seed: int = 0,
    seeds: int = 3,
    epochs: int = 40,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Demo:
    """Train all networks of the demo; the seeds are `seed`, `seed + 1`, and so on.

    `on_progress(what, done, all)` is told the epochs done over all trainings together. Needs
    scikit-learn for the digits (ValueError without it); takes about a second a network at 40
    epochs. Uses one thread, since the networks are too small to share among several.
    """
    dataset = load("digits")
    plan = [("dense", 0.0)] + [(m, sparsity) for sparsity in SPARSITIES for m in METHODS]
    trainings = [(m, sparsity, s) for m, sparsity in plan for s in range(seed, seed + seeds)]
    started = time.perf_counter()
    runs = []
    with torch_threads(1):
        for number, (method, sparsity, run_seed) in enumerate(trainings):
            label = METHODS.get(method, method) + (f" {100 * sparsity:g} %" if sparsity else "")

            def progress(record: EpochRecord, label: str = label, done: int = number) -> None:
                if on_progress is not None:
                    on_progress(label, done * epochs + record.epoch, len(trainings) * epochs)

            runs.append(_train(dataset, method, sparsity, run_seed, epochs, progress))
    return Demo(tuple(runs), epochs, time.perf_counter() - started)


def write_demo(demo: Demo, out: Path) -> tuple[Path, Path]:
    """Write the picture and the page into the folder `out`; returns both paths."""
    figure = draw(demo)
    picture = plots.save(figure, out / "comparison.png")
    return picture, _page(demo, plots.to_png(figure)).write(out / "index.html")


def draw(demo: Demo) -> Figure:
    """Accuracy against sparsity, density per layer and age of the active weights, side by side."""
    figure = plots.new_figure(13.5, 4.2)
    figure.set_layout_engine("constrained", w_pad=0.12)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
    plots.accuracy_against_sparsity(
        {
            label: {s: [run.accuracy for run in demo.of(method, s)] for s in SPARSITIES}
            for method, label in METHODS.items()
        },
        dense=[run.accuracy for run in demo.of("dense", 0.0)],
        ax=left,
    )
    plots.density_per_layer(
        {f"{100 * s:g} % sparse": demo.of("rigl", s)[0].densities for s in SPARSITIES},
        title="Weights kept in each layer (ERK)",
        ax=middle,
    )
    densest = demo.of("rigl", SPARSITIES[-1])[0]
    plots.mask_age(
        densest.ages, title=f"Age of RigL's weights at {100 * SPARSITIES[-1]:g} %", ax=right
    )
    return figure


def _train(
    dataset: Dataset,
    method: str,
    sparsity: float,
    seed: int,
    epochs: int,
    on_epoch: Callable[[EpochRecord], None],
) -> DemoRun:
    started = time.perf_counter()
    model = build("mlp", widths=_WIDTHS, in_shape=dataset.in_shape, classes=10, seed=seed)
    steps = epochs * math.ceil(len(dataset.train_x) / _BATCH_SIZE)
    base = SGD(
        model.parameters(), lr=_LEARNING_RATE, momentum=_MOMENTUM, weight_decay=_WEIGHT_DECAY
    )
    scheduler = CosineAnnealingLR(base, steps)
    optimizer: Optimizer = base
    sparse = None
    if method != "dense":
        optimizer = sparse = SparseOptimizer(
            base, model, _policy(method, sparsity, steps), seed=seed
        )
    ages = None if sparse is None else MaskAges(sparse)
    history = fit(
        model,
        optimizer,
        dataset,
        epochs=epochs,
        batch_size=_BATCH_SIZE,
        seed=seed,
        scheduler=scheduler,
        on_epoch=on_epoch,
        progress=False,
    )
    total = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)
    flops = None if sparse is None else training_flops(sparse, model, dataset.train_x[:1])
    targets = {} if sparse is None else sparse.targets
    return DemoRun(
        method=method,
        sparsity=sparsity,
        seed=seed,
        accuracy=history.last.test_accuracy,
        kept=sum(target.active for target in targets.values()) if targets else total,
        training_multiple=flops.training_multiple if flops else 1.0,
        inference_multiple=flops.inference_multiple if flops else 1.0,
        densities={n.removesuffix(".weight"): target.density for n, target in targets.items()},
        ages=tuple(ages.records) if ages else (),
        seconds=time.perf_counter() - started,
    )


def _policy(method: str, sparsity: float, steps: int) -> Policy:
    if method == "static":
        return Static(sparsity=sparsity)
    return RigL.model_validate(
        {"sparsity": sparsity, "total_steps": steps, "update": {"every": _UPDATE_EVERY}}
    )


def _row(label: str, sparsity: str, runs: Sequence[DemoRun]) -> list[str]:
    first = runs[0]
    return [
        label,
        sparsity,
        mean_and_error([run.accuracy for run in runs]),
        f"{first.kept:,}",
        _multiple([run.training_multiple for run in runs]),
        _multiple([run.inference_multiple for run in runs]),
    ]


def mean_and_error(accuracies: Sequence[float]) -> str:
    """Mean and, of two or more values, its standard error, in per cent."""
    mean = sum(accuracies) / len(accuracies)
    if len(accuracies) < 2:
        return f"{100 * mean:.1f} %"
    variance = sum((value - mean) ** 2 for value in accuracies) / (len(accuracies) - 1)
    return f"{100 * mean:.1f} ± {100 * math.sqrt(variance / len(accuracies)):.1f} %"


def _multiple(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.3f} x"


def _page(demo: Demo, picture: bytes) -> html.Page:
    seeds = sorted({run.seed for run in demo.runs})
    sparsest = 100 * SPARSITIES[-1]
    accuracy = {
        method: sum(run.accuracy for run in demo.of(method, SPARSITIES[-1])) / len(seeds)
        for method in METHODS
    }
    lead = (
        f"With {sparsest:g} % of the weights at zero throughout training, RigL reaches "
        f"{100 * accuracy['rigl']:.1f} % test accuracy and a fixed random pattern "
        f"{100 * accuracy['static']:.1f} %."
    )
    facts = {
        "data": "digits of scikit-learn: 1,437 training and 360 test images of 8 x 8 pixels",
        "network": "fully connected, 64-300-100-10, ReLU",
        "training": f"{demo.epochs} epochs, batches of {_BATCH_SIZE}, SGD with momentum "
        f"{_MOMENTUM}, learning rate {_LEARNING_RATE} decaying to 0 as a cosine, weight decay "
        f"{_WEIGHT_DECAY}",
        "RigL": f"masks change every {_UPDATE_EVERY} steps during the first 75 % of training, "
        "30 % of the weights at first",
        "seeds": ", ".join(map(str, seeds)),
        "time": f"{demo.seconds:.0f} s for {len(demo.runs)} trainings on one thread",
    }
    return html.Page(
        "Sparse training on handwritten digits",
        lead,
        (
            html.Section(
                "Comparison",
                html.Table(COLUMNS, demo.rows()),
                "Static keeps one random pattern throughout; RigL moves it. Both spread the "
                "weights over the layers by the Erdos-Renyi kernel rule. Accuracies are the mean "
                "and the standard error over the seeds. FLOPs are multiples of those of the dense "
                "network, counted as in the RigL paper; they become time only in a storage that "
                "skips zeros.",
            ),
            html.Section(
                "Picture",
                html.Picture(picture, "Accuracy against sparsity, density per layer, weight age"),
                "The left panel shows what sparsity costs, the middle one where the weights are "
                "kept, the right one how long RigL's weights have been active on average.",
            ),
            html.Section("What was run", html.Facts(facts | environment())),
        ),
    )
