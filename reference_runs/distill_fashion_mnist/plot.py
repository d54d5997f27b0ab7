"""How much a teacher helps, by method and cut, a panel a network.

python -m reference_runs.distill_fashion_mnist.plot
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reference_runs import _common as common
from reference_runs.distill_fashion_mnist.methods import CUTS, METHODS, RULE, cuts_of, shown
from reference_runs.distill_fashion_mnist.run import HERE, NETWORKS, Key, key_of
from sparsetrain.report import plots

COLOURS = {
    "plain": "#444444",
    "logits": "#0072B2",
    "logits_only": "#56B4E9",
    "hidden": "#E69F00",
    "attention": "#009E73",
}


def main() -> None:
    """Read results.json and write test_error.png."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--results", type=Path, default=HERE / "results.json")
    parser.add_argument("--out", type=Path, default=HERE / "test_error.png")
    arguments = parser.parse_args()
    rows = json.loads(arguments.results.read_text(encoding="utf-8"))["table"]
    common.console.print(f"wrote {plots.save(errors(rows), arguments.out)}")


def errors(rows: list[common.Record]) -> Figure:
    """A panel a network and cut: a dot a method, the dense network as a line."""
    panels = [(n, cut) for n in NETWORKS for cut in cuts_of(n)]
    figure = plots.new_figure(11.0, 3.6)
    found = {key_of(row): row for row in rows}
    for ax, (network, cut) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        _panel(ax, found, network, cut)
    figure.suptitle("Fashion-MNIST, test error after the cut and training, mean ± standard error")
    figure.supylabel("Test error [%]", fontsize=10)
    handles, labels = [], []
    for ax in figure.axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles.append(handle)
                labels.append(label)
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=3)
    return figure


def _panel(ax: Axes, rows: dict[Key, common.Record], network: str, cut: str) -> None:
    dense = rows.get((network, "none", "dense", ""))
    if dense is not None:
        style = {"color": "#444444", "linestyle": "--", "linewidth": 1}
        ax.axhline(dense["test_error"], label="Dense, the teacher", **style)
    for place, method in enumerate(shown(network)):
        row = rows.get((network, cut, method, RULE))
        if row is not None:
            ax.errorbar(
                place,
                row["test_error"],
                yerr=row["test_error_standard_error"],
                label=METHODS[method].label,
                color=COLOURS[method],
                marker="o",
                linestyle="none",
                capsize=3,
            )
    ax.set_title(f"{NETWORKS[network].label},\n{CUTS[cut].label}", loc="left", fontsize=9)
    ax.set_xticks([])
    ax.margins(x=0.2)
    ax.grid(color="#DDDDDD", linewidth=0.6, axis="y")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
