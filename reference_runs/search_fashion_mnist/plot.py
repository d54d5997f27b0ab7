"""What layers bear, what searches found, and the front of accuracy against FLOPs.

python -m reference_runs.search_fashion_mnist.plot
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

import sparsetrain as st
from reference_runs import _common as common
from reference_runs.search_fashion_mnist.networks import HERE, trained
from reference_runs.search_fashion_mnist.run import EXAMPLE, METHODS, TARGETS, channels
from sparsetrain.report import plots

COLOURS = {
    "uniform": "#555555",
    "sensitivity": "#E69F00",
    "least_loss": "#009E73",
    "evolution": "#0072B2",
    "amc": "#D55E00",
}


def main() -> None:
    """Read results.json and write the pictures."""
    results = json.loads((HERE / "results.json").read_text(encoding="utf-8"))
    first = next(run for run in results["runs"] if run.get("sensitivity"))
    knobs = channels().bind(trained(first["seed"]), EXAMPLE)
    kept = first["sensitivity"]
    found = st.search.Sensitivity(
        knobs,
        tuple(kept["ratios"]),
        kept["baseline"],
        {name: tuple(values) for name, values in kept["metrics"].items()},
        0,
    )
    found.plot(HERE / "sensitivity.png")
    plots.save(methods(results["table"]), HERE / "test_error.png")
    common.console.print(f"wrote the pictures into {HERE}")


def methods(rows: Sequence[common.Record]) -> Figure:
    """Test error of each method at each target, before and after tuning."""
    figure = plots.new_figure(12.0, 4.2)
    for ax, moment in zip(figure.subplots(1, 2), ("before", "after"), strict=True):
        _panel(ax, rows, moment)
    return figure


def _panel(ax: Axes, rows: Sequence[common.Record], moment: str) -> None:
    for number, method in enumerate(METHODS):
        mine = {row["target"]: row for row in rows if row["method"] == method}
        shown = [target for target in TARGETS if target in mine]
        ax.errorbar(
            [list(TARGETS).index(target) + 0.12 * (number - 2) for target in shown],
            [mine[target][moment] for target in shown],
            yerr=[mine[target][f"{moment}_standard_error"] for target in shown],
            fmt="o",
            capsize=3,
            color=COLOURS[method],
            label=METHODS[method],
        )
    ax.set_xticks(range(len(TARGETS)), list(TARGETS), fontsize=8)
    plots.finish(ax, f"{moment.capitalize()} fine-tuning", "", "Test error [%]")
    if moment == "after":
        ax.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


if __name__ == "__main__":
    main()
