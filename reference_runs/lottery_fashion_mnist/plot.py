"""Tickets against their controls: test error, and when training would stop early.

python -m reference_runs.lottery_fashion_mnist.plot
"""

from __future__ import annotations

import json
from typing import Any

from reference_runs import _common as common
from reference_runs.lottery_fashion_mnist.run import HERE, NETWORKS, REWINDS
from sparsetrain.report import plots

STYLES = {"ticket": "o-", "fresh": "s--", "random": "^:"}


def main() -> None:
    """Read results.json and write tickets.png beside it."""
    rows = json.loads((HERE / "results.json").read_text(encoding="utf-8"))["tickets"]
    figure = plots.new_figure(9.6, 6.6)
    axes = figure.subplots(2, len(REWINDS), sharex=True, sharey="row")
    for column, step in enumerate(REWINDS):
        top, bottom = axes[0][column], axes[1][column]
        for name, label in NETWORKS.items():
            mine = [r for r in rows if (r["rewind_to"], r["network"]) == (step, name)]
            draw(top, mine, "test_error", STYLES[name], label)
            draw(bottom, mine, "stopped_at", STYLES[name], label)
        top.set_title(f"Rewound to step {step}")
        bottom.set_xlabel("Weights kept [%]")
    axes[0][0].set_ylabel("Test error [%]")
    axes[1][0].set_ylabel("Step of lowest validation loss")
    axes[0][0].legend(fontsize=8)
    figure.suptitle("Lottery tickets: LeNet-300-100 on Fashion-MNIST, mean ± standard error")
    common.console.print(f"wrote {plots.save(figure, HERE / 'tickets.png')}")


def draw(ax: Any, rows: list[common.Record], what: str, style: str, label: str) -> None:
    """One line through the rounds, from dense to sparse."""
    kept = [100 * row["kept"] for row in rows]
    values = [row[what] for row in rows]
    errors = [row["standard_error"] for row in rows] if what == "test_error" else None
    ax.errorbar(kept, values, yerr=errors, fmt=style, label=label, markersize=4, capsize=2)
    ax.set_xscale("log")
    ax.set_xlim(110, 1.3)
    ax.set_xticks([100, 60, 36, 22, 13, 8, 4.7, 2.8, 1.7])
    ax.get_xaxis().set_major_formatter("{x:g}")
    ax.minorticks_off()
    ax.grid(color="#DDDDDD", linewidth=0.6)


if __name__ == "__main__":
    main()
