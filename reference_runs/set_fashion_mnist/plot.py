"""Learning curves of the SET table: mean and standard deviation over seeds.

python -m reference_runs.set_fashion_mnist.plot
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from reference_runs import _common as common
from reference_runs.set_fashion_mnist.run import HERE, METHODS, PUBLISHED_LAST
from sparsetrain.report import plots

COLOURS = {"dense": "#555555", "set": "#0072B2", "static": "#E69F00"}
LABELS = {"dense": "dense", "set": "SET", "static": "fixed random"}
#: Mean test accuracy [%] over seeds at some epochs, in the authors' files.
PUBLISHED_CURVES = {
    "dense": {1: 67.26, 5: 75.96, 10: 79.46, 20: 80.88, 50: 82.50, 100: 82.04, 200: 81.92},
    "set": {1: 21.14, 5: 59.70, 10: 69.10, 20: 73.00, 50: 79.18, 100: 80.18, 200: 81.62},
    "static": {1: 21.14, 5: 47.10, 10: 63.02, 20: 70.60, 50: 74.32, 100: 78.44, 200: 79.64},
}


def main() -> None:
    """Read results.json and write learning_curves.png beside it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--results", type=Path, default=HERE / "results.json")
    path: Path = parser.parse_args().results
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    figure = plots.new_figure(9.0, 4.2)
    early, late = figure.subplots(1, 2)
    for method in METHODS:
        curves = [run["test_curve"] for run in runs if run["method"] == method]
        if not curves:
            continue
        values = 100 * np.array(curves)
        epochs = np.arange(1, values.shape[1] + 1)
        centre, spread = values.mean(axis=0), values.std(axis=0)
        published = common.mean(PUBLISHED_LAST[method])
        points = {**PUBLISHED_CURVES[method], 400: published}
        for ax in (early, late):
            colour = COLOURS[method]
            ax.plot(epochs, centre, color=colour, linewidth=1.2, label=LABELS[method])
            ax.fill_between(epochs, centre - spread, centre + spread, color=colour, alpha=0.2, lw=0)
            ax.plot(list(points), list(points.values()), "o", color=colour, mfc="white", ms=5)
        late.axhline(published, color=COLOURS[method], linestyle="--", linewidth=1.0)
    early.set(xscale="log", title="All epochs", ylabel="Test accuracy [%]")
    late.set(ylim=(77, 85), title="The last percent")
    late.plot([], [], "--", color="black", linewidth=1.0, label="published, last epoch")
    late.plot([], [], "o", color="black", mfc="white", ms=5, label="published, mean of 5 seeds")
    late.legend(fontsize=8, loc="lower right")
    for ax in (early, late):
        ax.set_xlabel("Epoch")
        ax.grid(color="#DDDDDD", linewidth=0.6)
        ax.set_axisbelow(True)
    common.console.print(f"wrote {plots.save(figure, path.with_name('learning_curves.png'))}")


if __name__ == "__main__":
    main()
