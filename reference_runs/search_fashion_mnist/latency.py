"""Measured latency of the networks that searches chose: those for FLOPs against those for latency.

    python -m reference_runs.search_fashion_mnist.latency --table
    python -m reference_runs.search_fashion_mnist.latency

The first, before `run`, measures the latency table; the second, after it, the chosen networks. Both
on a machine with nothing else to do, on one thread. Writes latency_table.json, and latency.json,
latency.png and its table.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure

import sparsetrain as st
from reference_runs import _common as common
from reference_runs.channels_fashion_mnist.networks import NETWORKS, fast
from reference_runs.search_fashion_mnist.networks import HERE, NETWORK
from reference_runs.search_fashion_mnist.run import EXAMPLE, METHODS, TABLE, channels
from sparsetrain.report import plots

ROUNDS, SECONDS = 21, 0.02  # of a network in a round, at least
#: The searches that are compared, and their colours.
COMPARED = {"uniform": "#555555", "least_loss": "#009E73", "evolution": "#0072B2"}


def make_table() -> None:
    """Measure layers; values of weights make no difference."""
    model = fast(NETWORKS[NETWORK].build())
    st.cost.latency_table(model, EXAMPLE, storages=("dense",), progress=True, path=TABLE)
    common.console.print(f"wrote {TABLE}")


def measure(runs: Sequence[common.Record]) -> list[common.Record]:
    """A record a chosen network: measured latency as a share of the whole network's."""
    whole = fast(NETWORKS[NETWORK].build()).eval()
    knobs = channels().bind(whole, EXAMPLE)
    predicted = st.search.CostOf(st.Latency(1.0, table=TABLE), knobs)
    # All in turn, so that what else the machine does slows all of them alike.
    models = [whole, *(fast(knobs.network(run["ratios"])) for run in runs)]
    base, *times = st.cost.latency(models, EXAMPLE, rounds=ROUNDS, seconds=SECONDS)
    records = []
    for run, seconds in zip(runs, times, strict=True):
        kept = ("seed", "method", "target", "before", "after", "flops")
        record = {name: run[name] for name in kept}
        record["latency"] = round(predicted(run["ratios"]) / predicted.whole, 4)
        records.append({**record, "measured": round(seconds / base, 4)})
    return records


def curve(records: Sequence[common.Record], method: str, measure: str) -> list[tuple[float, float]]:
    """(measured latency, test error after tuning [%]) of a method's targets of a measure."""
    groups: dict[str, list[common.Record]] = defaultdict(list)
    for record in records:
        if record["method"] == method and measure in record["target"]:
            groups[record["target"]].append(record)
    points = [
        (common.mean([r["measured"] for r in g]), 100 * common.mean([r["after"] for r in g]))
        for g in groups.values()
    ]
    return sorted(points)


def time_at(points: Sequence[tuple[float, float]], error: float) -> float | None:
    """Measured latency at a test error, between the points in proportion; None outside them."""
    errors = [e for _, e in points]
    falling = list(np.minimum.accumulate(errors))  # more time is never worse: the best so far
    if not falling[-1] <= error <= falling[0]:
        return None
    return float(np.interp(-error, [-e for e in falling], [t for t, _ in points]))


def table_of(records: Sequence[common.Record]) -> str:
    """Predicted and measured latency, and time at equal error."""
    predicted = np.array([r["latency"] for r in records])
    measured = np.array([r["measured"] for r in records])
    off = np.abs(predicted / measured - 1)
    ranks = [np.argsort(np.argsort(values)) for values in (predicted, measured)]
    parts = [
        f"Predicted against measured latency of these {len(records)} networks: median error "
        f"{100 * float(np.median(off)):.1f} %, rank correlation "
        f"{float(np.corrcoef(*ranks)[0, 1]):.3f}."
    ]
    lines = []
    for method in COMPARED:
        by_flops = curve(records, method, "FLOPs")
        by_latency = curve(records, method, "latency")
        low = max(min(e for _, e in points) for points in (by_flops, by_latency))
        high = min(max(e for _, e in points) for points in (by_flops, by_latency))
        for error in np.linspace(low, high, 5)[1:-1]:
            pair = time_at(by_flops, error), time_at(by_latency, error)
            if None not in pair:
                gain = pair[0] / pair[1]  # type: ignore[operator]
                cells = [f"{pair[0]:.3f}", f"{pair[1]:.3f}", f"{gain:.3f}x"]
                lines.append([METHODS[method], f"{error:.2f}", *cells])
    head = ["search", "test error [%]", "time, searched by FLOPs", "by latency", "gain"]
    return "\n\n".join([*parts, common.markdown_table(head, lines)])


def draw(records: Sequence[common.Record]) -> Figure:
    """Test error after tuning against measured latency."""
    figure = plots.new_figure(6.5, 4.2)
    axes = figure.subplots()
    for method, colour in COMPARED.items():
        for measure_, style in (("FLOPs", "--"), ("latency", "-")):
            points = curve(records, method, measure_)
            label = f"{METHODS[method]}, by {measure_}"
            axes.plot(*zip(*points, strict=True), style, marker="o", color=colour, label=label)
    plots.finish(
        axes,
        "Searched by FLOPs and by latency",
        "Measured latency, of the whole network's",
        "Test error after fine-tuning [%]",
    )
    axes.legend(fontsize=8, frameon=False)
    return figure


def main() -> None:
    """Measure the table, or the chosen networks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--table", action="store_true", help="measure the latency table instead")
    parser.add_argument("--only-write", action="store_true", help="table of what was measured")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.table:
        make_table()
        return
    out = HERE / "latency.json"
    if arguments.only_write:
        records = json.loads(out.read_text(encoding="utf-8"))["networks"]
    else:
        results = json.loads((HERE / "results.json").read_text(encoding="utf-8"))
        records = measure([run for run in results["runs"] if "ratios" in run])
        common.write_json(out, {"machine": common.machine(), "networks": records})
    plots.save(draw(records), HERE / "latency.png")
    common.put_into(HERE / "README.md", table_of(records), section="latency")


if __name__ == "__main__":
    main()
