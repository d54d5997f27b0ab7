"""Perplexity against sparsity, one line a method; 2:4 beside it.

python -m reference_runs.char_transformer.plot
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reference_runs import _common as common
from reference_runs.char_transformer.methods import METHODS, PATTERNS
from sparsetrain.report import plots

HERE = Path(__file__).parent
#: Colour and marker of each kind; a method with OWL has the hollow marker of its kind.
STYLES = {
    "magnitude": ("#888888", "o"),
    "wanda_at_once": ("#56B4E9", "s"),
    "wanda": ("#0072B2", "D"),
    "sparsegpt": ("#D55E00", "^"),
}
#: What may stand on the logarithmic axis.
TICKS = (2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 10, 12, 15, 20, 30, 50, 100, 200, 500, 1000)


def main() -> None:
    """Read results.json and write perplexity.png beside it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--results", type=Path, default=HERE / "results.json")
    path: Path = parser.parse_args().results
    rows = json.loads(path.read_text(encoding="utf-8"))["table"]
    figure = perplexity_against_sparsity(rows)
    common.console.print(f"wrote {plots.save(figure, path.with_name('perplexity.png'))}")


def perplexity_against_sparsity(rows: list[common.Record]) -> Figure:
    """Sparsities that are free of a structure on the left, n:m on the right."""
    figure = plots.new_figure(8.0, 4.4)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[4, 1])
    free = [name for name, pattern in PATTERNS.items() if pattern.structure == "unstructured"]
    _draw(left, rows, free)
    _draw(right, rows, [name for name in PATTERNS if name not in free])
    left.set_yscale("log")
    low, high = left.get_ylim()
    ticks = [tick for tick in TICKS if low <= tick <= high]
    left.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    left.minorticks_off()
    right.minorticks_off()
    left.set_ylabel("Perplexity of a character")
    left.set_xlabel("Zeros among the weights of the blocks")
    title = "Pruned in one shot, mean ± standard error"
    left.set_title(title, loc="left", fontsize=11, fontweight="bold")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=9, frameon=False, loc="outside right center")
    return figure


def _draw(ax: Axes, rows: list[common.Record], patterns: list[str]) -> None:
    """The methods at these patterns, each pattern at a place of its own."""
    found = {(row["method"], row["pattern"]): row for row in rows}
    if dense := found.get(("dense", "dense")):
        level = dense["perplexity"]
        ax.axhline(level, color="#444444", linestyle="--", linewidth=1.2, label="Dense")
    for method, chosen in METHODS.items():
        mine = [(p, found[method, p]) for p in patterns if (method, p) in found]
        if not mine:
            continue
        colour, marker = STYLES[method.removesuffix("_owl")]
        ax.errorbar(
            # A little to the right, so that both markers of a kind are seen.
            [patterns.index(pattern) + (0.08 if chosen.owl else 0.0) for pattern, _ in mine],
            [row["perplexity"] for _, row in mine],
            yerr=[row["standard_error"] for _, row in mine],
            label=chosen.label,
            color=colour,
            marker=marker,
            markersize=6,
            markerfacecolor="white" if chosen.owl else colour,
            linestyle="none" if chosen.owl else "-",
            linewidth=1.5,
            elinewidth=1.0,
            capsize=3,
        )
    ax.set_xticks(range(len(patterns)), patterns)
    ax.set_xlim(-0.3, len(patterns) - 0.7)
    ax.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
