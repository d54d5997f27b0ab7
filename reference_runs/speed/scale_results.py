"""What `scale.py` found, as a table and a picture."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from reference_runs import _common as common
from sparsetrain.report import plots

Record = common.Record
SECONDS_GOAL = 2.0
PICTURE = "scale.png"


def tables(results: Record) -> list[str]:
    """The runs and the sweep, as Markdown."""
    parts = []
    if runs := results.get("scale"):
        parts.append(_runs(runs))
    if sweep := results.get("scale_sweep"):
        parts += [_sweep(sweep), f"![Time a step against non-zeros]({PICTURE})"]
    return parts


def _runs(rows: list[Record]) -> str:
    head = [
        "SET on Fashion-MNIST",
        "dense-equivalent weights",
        "non-zeros",
        "steps",
        "loss, first and last 20 steps",
        "test accuracy",
        f"seconds a step with updates (goal {SECONDS_GOAL:g} at 10^6)",
        "between updates",
        "peak memory of the process [GB]",
    ]
    shown = [
        [
            f"784-{row['width']:,}-{row['width']:,}-{row['width']:,}-10, batch {row['batch']}",
            f"{row['weights']:.2e}",
            f"{row['nonzeros']:,}",
            row["steps"],
            f"{row['first_loss']:.3f} → {row['last_loss']:.3f}",
            f"{100 * row['test_accuracy']:.1f} % of {row['test_samples']:,}",
            f"**{row['seconds_a_step']:.3f}**",
            f"{row['seconds_between_updates']:.3f}",
            f"{row['peak_bytes'] / 1e9:.2f}",
        ]
        for row in rows
    ]
    return common.markdown_table(head, shown)


def _sweep(rows: list[Record]) -> str:
    head = [
        "neurons a layer",
        "non-zeros",
        "ms a step",
        "ns a non-zero",
        "one SET update [ms]",
        "memory of the network [MB]",
    ]
    shown = [
        [
            f"{row['width']:,}",
            f"{row['nonzeros']:,}",
            f"{row['ms']:.2f}",
            f"{1e6 * row['ms'] / row['nonzeros']:.1f}",
            f"{row['update_ms']:.1f}",
            f"{row['peak_bytes'] / 1e6:.0f}",
        ]
        for row in rows
    ]
    return common.markdown_table(head, shown)


def picture(rows: list[Record]) -> Figure:
    """Time a step against non-zeros, beside a line of constant time a non-zero."""
    nonzeros = [row["nonzeros"] for row in rows]
    times = [row["ms"] for row in rows]
    # Through the middle one in the logarithm, where overheads are small and caches still help.
    middle = len(rows) // 2
    slope = times[middle] / nonzeros[middle]
    figure = plots.new_figure(6.0, 4.2)
    ax = figure.subplots()
    ax.plot(nonzeros, times, marker="o", markersize=5, linewidth=1.6, label="training step, SET")
    ax.plot(
        nonzeros,
        [slope * number for number in nonzeros],
        color="#555555",
        linewidth=1.0,
        linestyle=":",
        label=f"linear: {1e6 * slope:.0f} ns a non-zero",
    )
    ax.set(xscale="log", yscale="log", xlabel="Non-zero weights", ylabel="Time a step [ms]")
    ax.set_title(
        "A training step against its non-zeros", loc="left", fontsize=11, fontweight="bold"
    )
    ax.grid(color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(facecolor="white", edgecolor="none")
    return figure


def save_picture(rows: list[Record], path: Path) -> None:
    """Write the picture as PNG."""
    common.console.print(f"wrote {plots.save(picture(rows), path)}")
