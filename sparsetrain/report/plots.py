"""Pictures of sparse training, drawn with matplotlib (from the extra `demo`).

Each function draws one thing, on the axes it is given or on a new figure, and returns the figure.
matplotlib is imported when a picture is drawn, never when this module is.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsetrain.report.ages import AgeRecord
from sparsetrain.report.events import UpdateEvent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours can be told apart with every common colour-vision deficiency.
_BLUE, _ORANGE, _GREEN, _PURPLE = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
_SKY, _RED, _YELLOW, _GREY = "#56B4E9", "#D55E00", "#C9B400", "#555555"
COLOURS = (_BLUE, _ORANGE, _GREEN, _RED, _PURPLE, _SKY, _YELLOW, _GREY)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_GRID = "#DDDDDD"


def new_figure(width: float = 6.0, height: float = 4.0) -> Figure:
    """An empty figure of that size in inches; needs no display.

    Raises ModuleNotFoundError when matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: str | Path) -> Path:
    """Write the figure to a file (PNG, SVG or PDF by its ending) and return the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, facecolor="white")
    return path


def to_png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor="white")
    return buffer.getvalue()


def accuracy_against_sparsity(
    results: Mapping[str, Mapping[float, Sequence[float]]],
    *,
    dense: Sequence[float] | None = None,
    title: str = "Accuracy against sparsity",
    ylabel: str = "Test accuracy [%]",
    ax: Axes | None = None,
) -> Figure:
    """One line per method: mean over seeds, with a bar of one standard error.

    `results[method][sparsity]` holds one value a seed, as fractions in [0, 1]; `dense` those of the
    dense network, drawn as a level. The sparsity axis is logarithmic in the weights that remain, so
    that 90, 95, 98 and 99 % are well apart. To plot an error instead, pass errors and a `ylabel`.
    """
    ax, figure = _axes(ax)
    if dense:
        mean, error = _mean_and_error(dense)
        ax.axhline(mean, color=_GREY, linewidth=1.2, linestyle="--", label="dense", zorder=1)
        ax.axhspan(mean - error, mean + error, color=_GREY, alpha=0.12, linewidth=0, zorder=0)
    for number, (method, by_sparsity) in enumerate(results.items()):
        sparsities = sorted(by_sparsity)
        points = [_mean_and_error(by_sparsity[sparsity]) for sparsity in sparsities]
        # A small shift keeps the error bars of different methods from covering each other.
        shift = 0.012 * (number - (len(results) - 1) / 2)
        ax.errorbar(
            [_remaining_decades(sparsity) + shift for sparsity in sparsities],
            [mean for mean, _ in points],
            yerr=[error for _, error in points],
            label=method,
            color=COLOURS[number % len(COLOURS)],
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=5,
            linewidth=1.6,
            elinewidth=1.0,
            capsize=3,
            zorder=3,
        )
    ticks = sorted({sparsity for by_sparsity in results.values() for sparsity in by_sparsity})
    ax.set_xticks([_remaining_decades(s) for s in ticks], [f"{100 * s:g}" for s in ticks])
    finish(ax, title, "Sparsity [% of weights that are zero]", ylabel)
    if len(results) > 3:
        _legend(ax, loc="center left", bbox_to_anchor=(1.0, 0.5))
    else:
        _legend(ax)
    return figure


def density_per_layer(
    densities: Mapping[str, Mapping[str, float]],
    *,
    title: str = "Density per layer",
    ax: Axes | None = None,
) -> Figure:
    """Grouped bars: for each layer, the share of weights kept under each label.

    `densities[label][layer]` is a fraction in [0, 1]; layers keep the order of the first label.
    """
    ax, figure = _axes(ax)
    layers = list(dict.fromkeys(layer for by_layer in densities.values() for layer in by_layer))
    width = 0.8 / max(len(densities), 1)
    for number, (label, by_layer) in enumerate(densities.items()):
        offset = (number - (len(densities) - 1) / 2) * width
        shown = [index for index, layer in enumerate(layers) if layer in by_layer]
        bars = ax.bar(
            [index + offset for index in shown],
            [100 * by_layer[layers[index]] for index in shown],
            width * 0.92,
            label=label,
            color=COLOURS[number % len(COLOURS)],
        )
        if len(layers) * len(densities) <= 12:
            ax.bar_label(bars, fmt="%.2g", fontsize=8, padding=1.5, color=_GREY)
    long_names = sum(len(layer) for layer in layers) > 50
    ax.set_xticks(
        range(len(layers)),
        layers,
        rotation=35 if long_names else 0,
        ha="right" if long_names else "center",
    )
    finish(ax, title, "", "Weights kept [%]")
    ax.set_ylim(0, 1.08 * ax.get_ylim()[1])
    if len(densities) > 1:
        _legend(ax)
    return figure


def mask_turnover(
    events: Sequence[UpdateEvent],
    *,
    title: str = "Weights replaced per update",
    ax: Axes | None = None,
) -> Figure:
    """Share of the active weights that each update drops and grows, over the training steps.

    One line where every update grows as many as it drops (SET, RigL), two lines otherwise
    (gradual pruning). The net numbers of the events count: a weight that is dropped and regrown in
    the same update does not show.
    """
    ax, figure = _axes(ax)
    steps = [event.step for event in events]
    dropped = [_share(event, "dropped") for event in events]
    grown = [_share(event, "grown") for event in events]
    lines = {"dropped": (dropped, _ORANGE), "grown": (grown, _BLUE)}
    if dropped == grown:
        lines = {"replaced": (dropped, _BLUE)}
    for label, (values, colour) in lines.items():
        ax.plot(steps, values, color=colour, linewidth=1.6, marker=".", markersize=4, label=label)
    finish(ax, title, "Training step", "Share of active weights [%]")
    ax.set_ylim(bottom=0)
    if len(lines) > 1:
        _legend(ax)
    return figure


def exploration_rate(
    runs: Mapping[str, Sequence[UpdateEvent]],
    *,
    title: str = "Weights ever active",
    ax: Axes | None = None,
) -> Figure:
    """R_s over the training steps: the share of all weights that were active at some time.

    `runs[label]` holds the events of one run. After Liu et al. (2021), "Do we actually need dense
    over-parameterization?", section 3.
    """
    ax, figure = _axes(ax)
    for number, (label, events) in enumerate(runs.items()):
        ax.plot(
            [event.step for event in events],
            [100 * event.exploration_rate for event in events],
            color=COLOURS[number % len(COLOURS)],
            linewidth=1.6,
            label=label,
        )
    finish(ax, title, "Training step", "Share of all weights [%]")
    ax.set_ylim(bottom=0)
    if len(runs) > 1:
        _legend(ax)
    return figure


def mask_age(
    ages: Sequence[AgeRecord],
    *,
    title: str = "Age of the active weights",
    ax: Axes | None = None,
) -> Figure:
    """Mean age of the active weights over the training steps, both counted in steps.

    The dotted diagonal is the age of a weight that was never replaced.
    """
    ax, figure = _axes(ax)
    steps = [record.step for record in ages]
    ax.plot(steps, steps, color=_GREY, linewidth=1.0, linestyle=":", label="never replaced")
    ax.plot(
        steps,
        [record.mean_age for record in ages],
        color=_BLUE,
        linewidth=1.6,
        label="mean of the active weights",
    )
    finish(ax, title, "Training step", "Age [steps]")
    ax.set_ylim(bottom=0)
    _legend(ax, loc="upper left")
    return figure


def learning_curve(
    curves: Mapping[str, Sequence[float]],
    *,
    title: str = "Test accuracy during training",
    ax: Axes | None = None,
) -> Figure:
    """Test accuracy after each epoch; `curves[label]` holds fractions, one an epoch."""
    from matplotlib.ticker import MaxNLocator

    ax, figure = _axes(ax)
    for number, (label, accuracies) in enumerate(curves.items()):
        ax.plot(
            range(1, len(accuracies) + 1),
            [100 * accuracy for accuracy in accuracies],
            color=COLOURS[number % len(COLOURS)],
            linewidth=1.6,
            marker="." if len(accuracies) <= 30 else None,
            label=label,
        )
    finish(ax, title, "Epoch", "Test accuracy [%]")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(curves) > 1:
        _legend(ax)
    return figure


def _axes(ax: Axes | None) -> tuple[Axes, Figure]:
    if ax is None:
        ax = new_figure().subplots()
    figure = ax.get_figure(root=True)
    assert figure is not None
    return ax, figure


def _legend(ax: Axes, **options: Any) -> None:
    ax.legend(facecolor="white", edgecolor="none", framealpha=0.85, **options)


def finish(ax: Axes, title: str, xlabel: str, ylabel: str) -> None:
    """Title, labels and grid as all pictures have them."""
    ax.set_title(title, loc="left", fontsize=11, fontweight="bold")
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    ax.grid(axis="y", color=_GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of fractions, in per cent; no error is known of a single value."""
    count = len(values)
    mean = sum(values) / count
    if count < 2:
        return 100 * mean, 0.0
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    return 100 * mean, 100 * math.sqrt(variance / count)


def _remaining_decades(sparsity: float) -> float:
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity {sparsity} is outside [0, 1)")
    return -math.log10(1 - sparsity)


def _share(event: UpdateEvent, change: str) -> float:
    active = sum(layer.active for layer in event.layers)
    changed = sum(int(getattr(layer, change)) for layer in event.layers)
    return 100 * changed / active if active else 0.0
