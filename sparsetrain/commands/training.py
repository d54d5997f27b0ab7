"""Commands that train: demo and train."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import MofNCompleteColumn, Progress

from sparsetrain.commands.console import out, says_errors


class Data(StrEnum):
    """Data sets that the train command takes."""

    digits = "digits"
    fashion_mnist = "fashion_mnist"
    mnist = "mnist"


class Network(StrEnum):
    """Networks that the train command takes."""

    lenet_300_100 = "lenet_300_100"
    lenet_5 = "lenet_5"
    mlp = "mlp"
    resnet_small = "resnet_small"


class Storage(StrEnum):
    """Ways to hold sparse weights; see the page on storage."""

    masked = "masked"
    csr = "csr"
    auto = "auto"


class LrSchedule(StrEnum):
    """Learning-rate schedules that the train command takes."""

    constant = "constant"
    cosine = "cosine"


@says_errors
def demo(
    folder: Annotated[
        Path, typer.Option("--out", help="Folder for the picture and the page.")
    ] = Path("sparsetrain-demo"),
    seed: Annotated[int, typer.Option(min=0, help="First seed.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 3,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of each training.")] = 40,
) -> None:
    """Train dense, static and RigL networks on handwritten digits and compare them.

    At 90, 95 and 98 % sparsity; takes less than a minute. Prints a table, and writes a picture
    and a web page that needs no other file.

    **Example**:

        sparsetrain demo --out my-demo --seed 7
    """
    from sparsetrain.demo import run_demo, write_demo

    console = out()
    with _bar("digits") as advance:
        result = run_demo(seed=seed, seeds=seeds, epochs=epochs, on_progress=advance)
    console.print(result)
    picture, page = write_demo(result, folder)
    console.print(f"{result.seconds:.0f} s for {len(result.runs)} trainings", highlight=False)
    console.print(f"wrote {picture} and {page}", soft_wrap=True, highlight=False)


@says_errors
def train(
    recipe: Annotated[
        str, typer.Argument(help="Recipe file, YAML or JSON; the word dense trains without one.")
    ],
    data: Annotated[Data, typer.Option(help="Data set.")] = Data.digits,
    network: Annotated[Network, typer.Option(help="Network.")] = Network.lenet_300_100,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training data.")] = 20,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples a step.")] = 128,
    lr: Annotated[float, typer.Option(help="Learning rate of SGD.")] = 0.1,
    lr_schedule: Annotated[
        LrSchedule, typer.Option(help="Learning rate over the steps; cosine ends at zero.")
    ] = LrSchedule.cosine,
    momentum: Annotated[float, typer.Option(help="Momentum of SGD, below 1.")] = 0.9,
    weight_decay: Annotated[float, typer.Option(help="Weight decay of SGD.")] = 5e-4,
    storage: Annotated[Storage, typer.Option(help="How sparse weights are held.")] = Storage.masked,
    seed: Annotated[
        int, typer.Option(min=0, help="Of weights, masks and the order of samples.")
    ] = 0,
    folder: Annotated[Path, typer.Option("--out", help="Folder of the run.")] = Path(
        "sparsetrain-run"
    ),
    root: Annotated[
        Path | None, typer.Option("--data-root", help="Folder with the data set's files.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the interrupted run in --out.")
    ] = False,
) -> None:
    """Train a reference network as a recipe says.

    The folder gets a checkpoint after each epoch, the metrics as JSON lines, and in the end the
    plain model, a summary, a picture and a page. With `--resume` and the same options an
    interrupted run ends bit for bit where it would have ended. A `total_steps` in the recipe must
    be the number of steps of the run: epochs times the batches in an epoch.

    **Example**, with 12 batches an epoch and so `total_steps: 240` in `rigl.yaml`:

        sparsetrain train rigl.yaml --data digits --epochs 20 --out my-run
    """
    from sparsetrain.recipe import Recipe
    from sparsetrain.report.run_page import write_run_page
    from sparsetrain.workbench import runs

    config = runs.RunConfig(
        recipe=None if recipe == "dense" else Recipe.load(recipe).to_dict(),
        data=data.value,
        network=network.value,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        lr_schedule=lr_schedule.value,
        momentum=momentum,
        weight_decay=weight_decay,
        storage=storage.value,
        seed=seed,
    )
    console = out()
    try:
        with _bar(f"{network.value} on {data.value}") as advance:
            summary = runs.train(
                config,
                folder,
                root=root,
                resume=resume,
                on_step=lambda done, steps: advance("", done, steps),
            )
    except KeyboardInterrupt:
        console.print("interrupted: the same command with --resume goes on after the last epoch")
        raise typer.Exit(130) from None
    console.print(f"test accuracy {100 * summary['test_accuracy']:.2f} %", highlight=False)
    if "sparsity" in summary:
        console.print(
            f"{100 * summary['sparsity']:.2f} % zeros; FLOPs as multiples of dense: training "
            f"{summary['training_multiple']:.3f}, inference {summary['inference_multiple']:.3f}",
            highlight=False,
        )
    console.print(f"wrote {write_run_page(folder)}", soft_wrap=True, highlight=False)


@contextmanager
def _bar(label: str) -> Iterator[Callable[[str, int, int], None]]:
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task(label, total=None)

        def advance(what: str, done: int, total: int) -> None:
            progress.update(task, description=what or label, completed=done, total=total)

        yield advance
