"""Test accuracy of MiniLM against the share of its encoder's weights that is kept.

python -m reference_runs.movement_minilm.plot
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure

from reference_runs import _common as common
from reference_runs.movement_minilm.tables import LABELS, SPARSE
from sparsetrain.report import plots

HERE = Path(__file__).parent


def main() -> None:
    """Read results.json and write test_accuracy.png beside it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--results", type=Path, default=HERE / "results.json")
    path: Path = parser.parse_args().results
    result = json.loads(path.read_text(encoding="utf-8"))
    figure = accuracy_against_kept(result["runs"])
    common.console.print(f"wrote {plots.save(figure, path.with_name('test_accuracy.png'))}")


def accuracy_against_kept(runs: list[common.Record]) -> Figure:
    """One line a method, mean ± standard error; the bag of word pieces as a dotted level."""
    accuracies: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        sparsity = round(1 - run["kept"], 6)
        accuracies[run["method"]][sparsity].append(run["test_accuracy"])
    shown = {LABELS[method]: accuracies[method] for method in SPARSE if method in accuracies}
    dense = accuracies["dense"][0.0] if "dense" in accuracies else None
    title = "MiniLM on Debian sections, mean ± standard error"
    figure = plots.accuracy_against_sparsity(shown, dense=dense, title=title)
    axes = figure.axes[0]
    if "bag" in accuracies:
        level = 100 * common.mean(accuracies["bag"][0.0])
        axes.axhline(level, color="#555555", linestyle=":", linewidth=1.2, label="bag of pieces")
        axes.legend(fontsize=9, frameon=False)
    axes.set_xlabel("Zeros among the encoder's weights [%]")
    return figure


if __name__ == "__main__":
    main()
