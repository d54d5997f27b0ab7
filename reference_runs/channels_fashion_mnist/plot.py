"""Test error of every method and cut, before and after fine-tuning, a picture for both networks.

python -m reference_runs.channels_fashion_mnist.plot
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, StrMethodFormatter

from reference_runs import _common as common
from reference_runs.channels_fashion_mnist.methods import METHODS
from reference_runs.channels_fashion_mnist.networks import HERE, NETWORKS
from reference_runs.channels_fashion_mnist.run import CUTS, MOMENTS
from sparsetrain.report import plots

#: Colour and marker of each method; a colour is a family.
STYLES = {
    "random": ("#BBBBBB", "o"),
    "l1": ("#444444", "o"),
    "l2": ("#444444", "s"),
    "geometric_median": ("#444444", "^"),
    "batch_norm_scale": ("#56B4E9", "o"),
    "activation_magnitude": ("#009E73", "o"),
    "activation_variance": ("#009E73", "s"),
    "taylor": ("#0072B2", "o"),
    "gate_fisher": ("#0072B2", "s"),
    "thinet": ("#D55E00", "o"),
    "thinet_discard": ("#D55E00", "s"),
    "lasso": ("#E69F00", "*"),
    "dcp": ("#7B4FA3", "D"),
    "slimming": ("#CC79A7", "o"),
    "slimming_fold": ("#CC79A7", "s"),
}
#: Ticks of the logarithmic axis of test errors [%].
TICKS = (7, 8, 9, 10, 12, 15, 20, 30, 50, 90)


def main() -> None:
    """Read results.json and write test_error.png."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--results", type=Path, default=HERE / "results.json")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the picture")
    arguments = parser.parse_args()
    rows = json.loads(arguments.results.read_text(encoding="utf-8"))["table"]
    path = plots.save(errors(rows), arguments.out / "test_error.png")
    common.console.print(f"wrote {path}")


def errors(rows: list[common.Record]) -> Figure:
    """A row of panels a network: before and after fine-tuning."""
    figure = plots.new_figure(11.0, 8.0)
    panels = figure.subplots(len(NETWORKS), len(MOMENTS), sharey="col", squeeze=False)
    for across, (network, chosen) in zip(panels, NETWORKS.items(), strict=True):
        mine = [row for row in rows if row["network"] == network]
        for ax, (moment, when) in zip(across, MOMENTS.items(), strict=True):
            for method in STYLES:
                _line(ax, mine, method, moment)
            _as_trained(ax, mine)
            _finish(ax, f"{chosen.label}, {when}")
    lines = panels[0][0].get_legend_handles_labels()
    panels[0][-1].legend(*lines, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.suptitle("Channels removed, Fashion-MNIST, mean ± standard error")
    figure.supxlabel("Channels removed of every layer, or FLOPs left", fontsize=10)
    figure.supylabel("Test error [%]", fontsize=10)
    return figure


def _as_trained(ax: Axes, rows: list[common.Record]) -> None:
    for row in rows:
        if row["method"] == "trained":
            ax.axhline(row["before"], color="#444444", linestyle="--", linewidth=1, label="whole")


def _line(ax: Axes, rows: list[common.Record], method: str, moment: str) -> None:
    by_cut = {row["cut"]: row for row in rows if row["method"] == method}
    if not by_cut:
        return
    colour, marker = STYLES[method]
    shown = [by_cut[cut] for cut in CUTS]
    for places, label in (([0, 1, 2], METHODS[method].label), ([3], None)):
        ax.errorbar(
            places,
            [shown[place][moment] for place in places],
            yerr=[shown[place][f"{moment}_standard_error"] for place in places],
            label=label,
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=1.2,
            elinewidth=1.0,
            capsize=2,
        )


def _finish(ax: Axes, title: str) -> None:
    ax.set_title(title, loc="left", fontsize=10)
    ax.set_xticks(range(len(CUTS)), list(CUTS))
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(FixedLocator(TICKS))
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.minorticks_off()
    ax.grid(color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
