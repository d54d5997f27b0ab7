"""Accuracy against time: one wide network trained densely, with masks, and truly sparse.

    python -m reference_runs.wall_clock.run

from the repository's root, on a machine that does nothing else. All contenders are trained in
turn, an epoch each, so that what else the machine does hits all of them. State is kept in a folder,
so the same command goes on where it was stopped. See the README beside this file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

import sparsetrain as st
from reference_runs import _common as common
from sparsetrain.report import plots
from sparsetrain.workbench import Dataset, Trainer, build, load

HERE = Path(__file__).parent
WIDTHS = (2048, 2048)
BATCH_SIZE = 128
LEARNING_RATE = 0.05  # cosine to 0, a value a step
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4
#: Label -> (sparsity or None, storage).
CONTENDERS = {
    "dense": (None, "masked"),
    "RigL 95 %, csr": (0.95, "csr"),
    "RigL 98 %, masked": (0.98, "masked"),
    "RigL 98 %, csr": (0.98, "csr"),
}


def begin(label: str, dataset: Dataset, epochs: int, seed: int) -> Trainer:
    """A contender before its first step."""
    sparsity, storage = CONTENDERS[label]
    model = build("mlp", in_shape=dataset.in_shape, classes=10, seed=seed, widths=WIDTHS)
    steps = epochs * -(-len(dataset.train_x) // BATCH_SIZE)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(
        model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
    )
    if sparsity is not None:
        policy = st.RigL(sparsity=sparsity, total_steps=steps, update={"every": 100})
        optimizer = st.SparseOptimizer(optimizer, model, policy, seed=seed, storage=storage)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    return Trainer(model, optimizer, dataset, batch_size=BATCH_SIZE, seed=seed, scheduler=scheduler)


def train_in_turn(epochs: int, seed: int, folder: Path) -> dict[str, Trainer]:
    """Train every contender, an epoch at a time; each epoch's state is kept in `folder`."""
    dataset = load("fashion_mnist")
    trainers = {label: begin(label, dataset, epochs, seed) for label in CONTENDERS}
    files = {label: folder / f"{number}.pt" for number, label in enumerate(CONTENDERS)}
    for label, trainer in trainers.items():
        if files[label].exists():
            trainer.load(files[label])
        else:
            _compile(trainer)
    for epoch in range(1, epochs + 1):
        for label, trainer in trainers.items():
            for record in trainer.run(epoch * trainer.steps_per_epoch):
                accuracy = 100 * record.test_accuracy
                words = f"{accuracy:.2f} % test accuracy, {record.seconds:.1f} s"
                common.console.print(f"epoch {epoch}/{epochs}  {label}: {words}")
                trainer.save(files[label])
    return trainers


def _compile(trainer: Trainer) -> None:
    """One pass without a step, so that no kernel is compiled on the clock."""
    x, y = trainer.dataset.train_x[:BATCH_SIZE], trainer.dataset.train_y[:BATCH_SIZE]
    trainer.loss_fn(trainer.model(x), y).backward()
    trainer.optimizer.zero_grad()


def curves(trainers: dict[str, Trainer]) -> list[common.Record]:
    """For each contender: seconds of training and test error after each epoch."""
    rows = []
    for label, trainer in trainers.items():
        seconds = [record.seconds for record in trainer.history.records]
        rows.append(
            {
                "label": label,
                "seconds": [round(sum(seconds[: i + 1]), 2) for i in range(len(seconds))],
                "test_error": [round(100 * (1 - a), 2) for a in trainer.history.accuracies],
            }
        )
    return rows


def picture(rows: list[common.Record], path: Path) -> None:
    """Test error against seconds of training, a line a contender."""
    figure = plots.new_figure(7.0, 4.2)
    ax = figure.subplots()
    colours = {"dense": "#333333", "95 %": "#0072B2", "98 %": "#D55E00"}
    for row in rows:
        colour = next(value for key, value in colours.items() if key in row["label"])
        style = "--" if "masked" in row["label"] else "-"
        ax.plot(row["seconds"], row["test_error"], style, color=colour, linewidth=1.2)
        ax.plot(row["seconds"][-1], row["test_error"][-1], "o", color=colour, markersize=6)
        ax.plot(
            [], [], "o" + style, color=colour, label=f"{row['label']}: {row['seconds'][-1]:.0f} s"
        )
    ax.set(
        xscale="log",
        xlabel="Seconds of training on two CPU cores",
        ylabel="Test error [%]",
        title="784-2048-2048-10 on Fashion-MNIST, the same epochs for all",
    )
    ax.grid(color="#DDDDDD", linewidth=0.6, which="both")
    ax.legend(fontsize=8, frameon=False)
    common.console.print(f"wrote {plots.save(figure, path)}")


def main() -> None:
    """Train, write results.json and wall_clock.png, and put the table into README.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    default = Path(tempfile.gettempdir()) / "sparsetrain-wall-clock"
    parser.add_argument("--state", type=Path, default=default, help="where to keep state")
    parser.add_argument("--plot-only", action="store_true")
    arguments = parser.parse_args()
    path = HERE / "results.json"
    if not arguments.plot_only:
        trainers = train_in_turn(arguments.epochs, arguments.seed, arguments.state)
        result = {
            "machine": common.machine(),
            "threads": torch.get_num_threads(),
            "epochs": arguments.epochs,
            "seed": arguments.seed,
            "contenders": curves(trainers),
        }
        common.write_json(path, result)
    rows = json.loads(path.read_text(encoding="utf-8"))["contenders"]
    picture(rows, HERE / "wall_clock.png")
    dense = rows[0]["seconds"][-1]
    table = [
        (
            row["label"],
            f"{row['test_error'][-1]:.2f}",
            f"{row['seconds'][-1]:.0f}",
            f"{dense / row['seconds'][-1]:.1f}x",
        )
        for row in rows
    ]
    header = ("", "test error [%]", "training [s]", "faster than dense")
    common.put_into(HERE / "README.md", common.markdown_table(header, table))


if __name__ == "__main__":
    main()
