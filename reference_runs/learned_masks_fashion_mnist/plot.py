"""Fronts of test error against weights kept, and what is left of each layer at 95 %.

python -m reference_runs.learned_masks_fashion_mnist.plot
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reference_runs import _common as common
from reference_runs.learned_masks_fashion_mnist.methods import LEARNED, METHODS
from reference_runs.learned_masks_fashion_mnist.run import HERE, NETWORKS
from sparsetrain.report import plots

#: Colour and marker of each method; those that learn no masks are grey.
STYLES = {
    "static": ("#888888", "o"),
    "rigl": ("#888888", "s"),
    "gradual": ("#444444", "^"),
    "soft_threshold": ("#0072B2", "D"),
    "hard_concrete": ("#D55E00", "v"),
    "gumbel_softmax": ("#E69F00", "P"),
    "variational_dropout": ("#CC79A7", "X"),
    "variational_dropout_long": ("#CC79A7", "d"),
    "movement": ("#009E73", "*"),
    "soft_movement": ("#56B4E9", "h"),
}
#: Ticks of the share of weights that are kept [%].
TICKS = (1, 2, 3, 5, 10)
ASKED = 0.95


def main() -> None:
    """Read results.json and write fronts_<network>.png and layers.png."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--results", type=Path, default=HERE / "results.json")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the pictures")
    arguments = parser.parse_args()
    rows = json.loads(arguments.results.read_text(encoding="utf-8"))["table"]
    for network in NETWORKS:
        mine = [row for row in rows if row["network"] == network]
        if mine:
            path = plots.save(fronts(mine, network), arguments.out / f"fronts_{network}.png")
            common.console.print(f"wrote {path}")
    path = plots.save(layers(rows), arguments.out / "layers.png")
    common.console.print(f"wrote {path}")


def fronts(rows: list[common.Record], network: str) -> Figure:
    """One line a method through what it keeps, mean and standard error; dense is a band."""
    figure = plots.new_figure(8.0, 4.6)
    ax = figure.subplots()
    for row in rows:
        if row["method"] == "dense":
            error, spread = row["test_error"], row["standard_error"]
            ax.axhline(error, color="#444444", linestyle="--", linewidth=1.2, label="Dense")
            ax.axhspan(error - spread, error + spread, color="#444444", alpha=0.15, linewidth=0)
    for method, (colour, marker) in STYLES.items():
        mine = sorted((r for r in rows if r["method"] == method), key=lambda row: row["kept"])
        if not mine:
            continue
        ax.errorbar(
            [100 * row["kept"] for row in mine],
            [row["test_error"] for row in mine],
            yerr=[row["standard_error"] for row in mine],
            label=METHODS[method].label,
            color=colour,
            marker=marker,
            markersize=6,
            linewidth=1.5,
            linestyle="-" if method in LEARNED else ":",
            elinewidth=1.0,
            capsize=3,
            zorder=3 if method in LEARNED else 2,
        )
    ax.set_xscale("log")
    ax.set_xticks(TICKS, [str(tick) for tick in TICKS])
    ax.minorticks_off()
    ax.set_xlabel("Weights kept [%]")
    ax.set_ylabel("Test error [%]")
    title = f"{NETWORKS[network]} on Fashion-MNIST, mean ± standard error"
    ax.set_title(title, loc="left", fontsize=11, fontweight="bold")
    _tidy(ax, "both")
    ax.legend(fontsize=9, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def layers(rows: list[common.Record]) -> Figure:
    """A row of panels a network, a panel a layer, a bar a method."""
    at = [row for row in rows if row["asked"] == ASKED]
    networks = [n for n in NETWORKS if any(row["network"] == n for row in at)]
    names = {n: list(next(r["densities"] for r in at if r["network"] == n)) for n in networks}
    columns = max((len(found) for found in names.values()), default=1)
    figure = plots.new_figure(2.6 * columns + 1.6, 2.9 * max(len(networks), 1))
    panels = figure.subplots(max(len(networks), 1), columns, squeeze=False)
    for across, network in zip(panels, networks, strict=False):
        found = {r["method"]: r["densities"] for r in at if r["network"] == network}
        shown = [method for method in STYLES if method in found][::-1]
        for number, ax in enumerate(across):
            if number >= len(names[network]):
                ax.set_visible(False)
                continue
            layer = names[network][number]
            values = [100 * found[method][layer] for method in shown]
            colours = [STYLES[method][0] for method in shown]
            bars = ax.barh(range(len(shown)), values, 0.7, color=colours)
            numbers = [f"{value:.1f}" if value < 10 else f"{value:.0f}" for value in values]
            ax.bar_label(bars, numbers, fontsize=8, padding=2, color="#444444")
            labels = [METHODS[method].label for method in shown] if number == 0 else []
            ax.set_yticks(range(len(shown)), labels or [""] * len(shown), fontsize=8)
            ax.set_xlim(0, 1.25 * max(values))
            ax.set_title(f"{NETWORKS[network]}, {layer.removesuffix('.weight')}", fontsize=9)
            _tidy(ax, "x")
    figure.supxlabel(f"Weights kept [%] when {100 * ASKED:g} % are asked to go", fontsize=10)
    return figure


def _tidy(ax: Axes, axis: Literal["both", "x"]) -> None:
    ax.grid(axis=axis, color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
