"""Test error against sparsity, and against training FLOPs, of the LeNet-300-100 grid.

python -m reference_runs.lenet_fashion_mnist.plot
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure

from reference_runs import _common as common
from reference_runs.lenet_fashion_mnist.methods import LABELS
from reference_runs.lenet_fashion_mnist.run import HERE
from sparsetrain.report import plots

#: Test errors in the pictures [%]; the static uniform mask leaves them at 98 and 99 %.
SHOWN = (9.8, 17.0)


def main() -> None:
    """Read results.json and write test_error.png and training_flops.png beside it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--results", type=Path, default=HERE / "results.json")
    path: Path = parser.parse_args().results
    result = json.loads(path.read_text(encoding="utf-8"))
    dense = [run["test_error"] for run in result["runs"] if run["method"] == "dense"]
    errors: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for method, label in LABELS.items():
        for run in result["runs"]:
            if run["method"] == method != "dense":
                errors[label][run["sparsity"]].append(run["test_error"])
    title = "LeNet-300-100 on Fashion-MNIST, mean ± standard error"
    figure = plots.accuracy_against_sparsity(
        errors, dense=dense, title=title, ylabel="Test error [%]"
    )
    figure.axes[0].set_ylim(*SHOWN)
    common.console.print(f"wrote {plots.save(figure, path.with_name('test_error.png'))}")
    figure = error_against_flops(result["table"])
    common.console.print(f"wrote {plots.save(figure, path.with_name('training_flops.png'))}")


def error_against_flops(rows: list[common.Record]) -> Figure:
    """One line a method through its sparsities: what an error costs in training."""
    figure = plots.new_figure(7.0, 4.2)
    ax = figure.subplots()
    for number, (method, label) in enumerate(LABELS.items()):
        mine = [row for row in rows if row["method"] == method]
        ax.errorbar(
            [row["training_flops"] for row in mine],
            [row["test_error"] for row in mine],
            yerr=[row["standard_error"] for row in mine],
            label=label,
            marker="osd^vPX*"[number],
            markersize=5,
            linewidth=1.4,
            capsize=3,
        )
    ax.set(
        xscale="log",
        xlabel="Training FLOPs, as a multiple of dense training",
        ylabel="Test error [%]",
        ylim=SHOWN,
        title="What a test error costs",
    )
    ax.grid(color="#DDDDDD", linewidth=0.6)
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


if __name__ == "__main__":
    main()
