"""Test error against sparsity, straight after pruning and after fine-tuning, a picture a network.

python -m reference_runs.one_shot_fashion_mnist.plot
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, StrMethodFormatter

from reference_runs import _common as common
from reference_runs.one_shot_fashion_mnist.methods import METHODS, SCOPES
from reference_runs.one_shot_fashion_mnist.networks import HERE, NETWORKS, SPARSITIES
from reference_runs.one_shot_fashion_mnist.run import MOMENTS
from sparsetrain.report import plots

#: Colour and marker of each method; a colour is a family.
STYLES = {
    "random": ("#BBBBBB", "o"),
    "gradient": ("#BBBBBB", "s"),
    "magnitude": ("#444444", "o"),
    "taylor": ("#0072B2", "o"),
    "taylor_squared": ("#0072B2", "s"),
    "taylor_sample": ("#0072B2", "^"),
    "fisher": ("#009E73", "o"),
    "fisher_model": ("#009E73", "s"),
    "obd": ("#E69F00", "o"),
    "obd_monte_carlo": ("#E69F00", "s"),
    "obd_hutchinson": ("#E69F00", "^"),
    "snip": ("#56B4E9", "D"),
    "grasp": ("#C9B400", "v"),
    "synflow": ("#000000", "X"),
    "wanda": ("#CC79A7", "D"),
    "sparsegpt": ("#D55E00", "*"),
    "obs": ("#7B4FA3", "*"),
    "obs_rounds": ("#7B4FA3", "P"),
    "obs_masks": ("#7B4FA3", "o"),
}
#: Ticks of the logarithmic axis of test errors [%].
TICKS = (9, 10, 11, 12, 14, 17, 20, 30, 50, 90)


def main() -> None:
    """Read results.json and write test_error_<network>.png."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--results", type=Path, default=HERE / "results.json")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the pictures")
    arguments = parser.parse_args()
    rows = json.loads(arguments.results.read_text(encoding="utf-8"))["table"]
    for network in NETWORKS:
        mine = [row for row in rows if row["network"] == network]
        if mine:
            path = plots.save(errors(mine, network), arguments.out / f"test_error_{network}.png")
            common.console.print(f"wrote {path}")


def errors(rows: list[common.Record], network: str) -> Figure:
    """A row of panels a scope: before and after fine-tuning."""
    figure = plots.new_figure(11.0, 8.0)
    panels = figure.subplots(len(SCOPES), len(MOMENTS), sharey="col", squeeze=False)
    for across, (scope, title) in zip(panels, SCOPES.items(), strict=True):
        mine = [row for row in rows if row["scope"] == scope]
        for ax, (moment, when) in zip(across, MOMENTS.items(), strict=True):
            _dense(ax, rows)
            for method in STYLES:
                _line(ax, [row for row in mine if row["method"] == method], method, moment)
            _finish(ax, f"{title[0].upper()}{title[1:]},\n{when}")
        lines = across[0].get_legend_handles_labels()
        across[-1].legend(*lines, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(f"{NETWORKS[network].label} on Fashion-MNIST, mean ± standard error")
    figure.supxlabel("Sparsity [% of weights that are zero]", fontsize=10)
    figure.supylabel("Test error [%]", fontsize=10)
    return figure


def _dense(ax: Axes, rows: list[common.Record]) -> None:
    for row in rows:
        if row["method"] == "dense":
            ax.axhline(row["before"], color="#444444", linestyle="--", linewidth=1, label="Dense")


def _line(ax: Axes, rows: list[common.Record], method: str, moment: str) -> None:
    shown = [row for row in rows if row[moment] is not None]
    if not shown:
        return
    colour, marker = STYLES[method]
    ax.errorbar(
        [_decades(row["sparsity"]) for row in shown],
        [row[moment] for row in shown],
        yerr=[row[f"{moment}_standard_error"] for row in shown],
        label=METHODS[method].label,
        color=colour,
        marker=marker,
        markersize=5,
        linewidth=1.2,
        elinewidth=1.0,
        capsize=2,
    )


def _decades(sparsity: float) -> float:
    """Logarithmic in the weights that remain, so that 90 and 95 % are well apart."""
    return -math.log10(1 - sparsity)


def _finish(ax: Axes, title: str) -> None:
    ax.set_title(title, loc="left", fontsize=10)
    ax.set_xticks([_decades(s) for s in SPARSITIES], [f"{100 * s:g}" for s in SPARSITIES])
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
