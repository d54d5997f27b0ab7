"""Pictures of searches: what layers bear, and the front of metric against cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sparsetrain.report.plots import COLOURS, finish, new_figure, save

if TYPE_CHECKING:
    from sparsetrain.search.points import SearchResult
    from sparsetrain.search.sensitivity import Sensitivity


def draw_sensitivity(found: Sensitivity, path: Path) -> Path:
    """A heat map: a row a layer, a column a ratio, the drop of the metric as colour and number."""
    names = list(found.drops)
    figure = new_figure(1.6 + 0.62 * len(found.ratios), 1.2 + 0.3 * len(names))
    axes = figure.subplots()
    rows = [found.drops[name] for name in names]
    worst = max(*(max(row) for row in rows), 1e-12)  # pruning may only have helped
    axes.imshow(rows, cmap="cividis_r", vmin=0, vmax=worst, aspect="auto")
    for y, row in enumerate(rows):
        for x, drop in enumerate(row):
            shade = "white" if drop > 0.5 * worst else "black"
            axes.text(x, y, f"{drop:.3f}", ha="center", va="center", color=shade, fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xticks(range(len(found.ratios)), [f"{ratio:.0%}" for ratio in found.ratios])
    axes.set_xlabel("removed of one layer")
    axes.set_title(f"Drop of the metric (it is {found.baseline:.4f} without pruning)", fontsize=9)
    return save(figure, path)


def draw_front(found: SearchResult, path: Path) -> Path:
    """Every evaluated network as a dot, and the front as a line."""
    figure = new_figure()
    axes = figure.subplots()
    axes.scatter(
        [point.cost for point in found.points],
        [point.metric for point in found.points],
        s=9,
        color=COLOURS[7],
        alpha=0.5,
        label="evaluated",
    )
    front = found.front
    axes.step(
        [point.cost for point in front],
        [point.metric for point in front],
        where="post",
        color=COLOURS[0],
        label="front",
    )
    cost = f"{found.target.kind}, share of the whole network"
    finish(axes, f"Search by {found.method}", cost, "metric")
    axes.legend(frameon=False)
    return save(figure, path)
