"""SET with 10^12 dense-equivalent weights a layer on Fashion-MNIST, in a laptop's memory.

    python -m reference_runs.speed.scale                      # 10^6 neurons a layer, 300 steps
    python -m reference_runs.speed.scale --width 100000 --steps 500
    python -m reference_runs.speed.scale --sweep              # time a step against non-zeros

from the repository's root. A run that was stopped goes on from its last checkpoint; one that is
finished goes on when it is asked for more steps. See the README beside this file.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from reference_runs import _common as common
from reference_runs.speed import truly_sparse
from reference_runs.speed.peak import peak
from reference_runs.speed.scale_results import PICTURE, save_picture
from reference_runs.speed.scale_training import Run, Settings
from reference_runs.speed.sections.causes import KEEP_FREED
from reference_runs.speed.sections.process_memory import reset_peak, risen
from sparsetrain.workbench import Dataset, evaluate, load

HERE = Path(__file__).parent
WIDTHS = (100, 300, 1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000)
#: Of the sweep: seconds for each width, and steps at the least.
_SECONDS, _LEAST = 5.0, 7
_SHOWN = 20  # steps that the loss in the progress bar is the mean of


def train(run: Run, steps: int, checkpoint: Path, save_every: int) -> None:
    """Train until `steps` steps are done in all, with a bar, writing checkpoints."""
    with _bar() as bar:
        label = f"{run.settings.width:,} neurons a layer"
        task = bar.add_task(label, total=steps, completed=len(run.losses), loss=float("nan"))
        while len(run.losses) < steps:
            run.step()
            run.peak_bytes = max(run.peak_bytes, peak())
            bar.update(task, completed=len(run.losses), loss=common.mean(run.losses[-_SHOWN:]))
            if len(run.losses) % save_every == 0 or len(run.losses) == steps:
                run.save(checkpoint)


@contextmanager
def _bar() -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=common.console) as bar:
        yield bar


def one_run(settings: Settings, arguments: argparse.Namespace) -> common.Record:
    """Train a network, from its checkpoint if there is one, and test it."""
    dataset = load("fashion_mnist")
    reset_peak()  # reading the data takes more for a moment than a small network does
    checkpoint = arguments.out / "checkpoints" / f"scale-{settings.width}.pt"
    run = Run(settings, dataset)
    common.console.print(
        f"{run.nonzeros:,} non-zeros for {run.weights:.3g} weights; "
        f"the process took up to {peak() / 1e9:.2f} GB to build them"
    )
    if checkpoint.exists() and not arguments.fresh:
        run.load(checkpoint)
        common.console.print(f"goes on from step {len(run.losses)} of {checkpoint}")
    train(run, arguments.steps, checkpoint, arguments.save_every)
    test = dataset.subset(1, min(arguments.test, len(dataset.test_x)), seed=0)
    accuracy = evaluate(run.model, test.test_x, test.test_y, batch_size=settings.batch)
    return run.record(accuracy, len(test.test_x))


def sweep(settings: Settings, widest: int) -> Iterator[common.Record]:
    """Time a step, and one SET update, at each width."""
    dataset = load("fashion_mnist")
    _timed(replace(settings, width=WIDTHS[0], every=0), dataset)  # compiles the kernels
    for width in WIDTHS:
        if width <= widest:
            row = _timed(replace(settings, width=width, every=0), dataset)
            common.console.print(row)
            yield row


def _timed(settings: Settings, dataset: Dataset) -> common.Record:
    gc.collect()
    start = reset_peak()
    run = Run(settings, dataset)
    for _ in range(2):
        run.step()
    run.seconds.clear()
    began = time.perf_counter()
    while len(run.seconds) < _LEAST or time.perf_counter() - began < _SECONDS:
        run.step()
    before = time.perf_counter()
    run.optimizer.update_masks()
    update = time.perf_counter() - before
    return {
        "width": settings.width,
        "connections": settings.connections,
        "batch": settings.batch,
        "nonzeros": run.nonzeros,
        "steps": len(run.seconds),
        "ms": round(1e3 * statistics.median(run.seconds), 4),
        "update_ms": round(1e3 * update, 3),
        "peak_bytes": risen(start),
    }


def keep_freed_memory() -> None:
    """Start again with an allocator (glibc's) that keeps what a step frees for the next one.

    It hands large blocks back to the system, and zeroing their pages anew takes most of a step.
    """
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        command = [sys.executable, "-m", "reference_runs.speed.scale", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **KEEP_FREED})


def main() -> None:
    """Run, then write truly_sparse.json, the picture and the tables in the README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--width", type=int, default=10**6, help="neurons a hidden layer")
    parser.add_argument("--connections", type=int, default=Settings.connections)
    parser.add_argument("--batch", type=int, default=Settings.batch)
    parser.add_argument("--rate", type=float, default=Settings.rate, help="learning rate")
    parser.add_argument("--every", type=int, default=Settings.every, help="steps a SET update")
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--steps", type=int, default=300, help="in all")
    parser.add_argument("--save-every", type=int, default=50, help="steps a checkpoint")
    parser.add_argument("--test", type=int, default=2000, help="test samples")
    parser.add_argument("--fresh", action="store_true", help="ignore the checkpoint")
    parser.add_argument("--sweep", action="store_true", help="time steps at widths up to --width")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of results and checkpoints")
    arguments = parser.parse_args()
    keep_freed_memory()
    names = ("width", "connections", "batch", "rate", "every", "seed")
    settings = Settings(**{name: getattr(arguments, name) for name in names})
    truly_sparse.prepare()
    path = arguments.out / truly_sparse.NAME
    results = truly_sparse.read(path)
    if arguments.sweep:
        results["scale_sweep"] = list(sweep(settings, arguments.width))
        save_picture(results["scale_sweep"], arguments.out / PICTURE)
    else:
        row = one_run(settings, arguments)
        others = [old for old in results.get("scale", []) if old["width"] != settings.width]
        results["scale"] = sorted([*others, row], key=lambda row: row["width"])
    results["machine_of_scale"] = truly_sparse.machine()
    truly_sparse.write(path, results)
    common.console.print(truly_sparse.tables(results), soft_wrap=True, markup=False)
    if arguments.out == HERE:
        truly_sparse.publish(results)


if __name__ == "__main__":
    main()
