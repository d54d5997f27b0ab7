"""FLOPs against measured latency and memory of networks that lost channels, torch and onnxruntime.

    python -m reference_runs.channels_fashion_mnist.latency

after `run`, on a machine with nothing else to do. Writes latency.json, latency.png and its tables.
Everything runs on one thread.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

import sparsetrain as st
from reference_runs import _common as common
from reference_runs.channels_fashion_mnist.networks import HERE, NETWORKS, built, fast, trained
from reference_runs.channels_fashion_mnist.run import CUTS, FLOOR
from reference_runs.speed.peak import peak
from sparsetrain.report import plots
from sparsetrain.timing import median_seconds

#: Groups of networks, each a line of the plot: label of a network -> arguments of `prune`.
GROUPS: dict[str, dict[str, dict[str, Any]]] = {
    "any count": {cut: CUTS[cut] for cut in ("30 %", "50 %", "70 %")},
    "multiples of 8": {
        f"{share}x FLOPs": {"flops": share, "round_to": 8} for share in (0.75, 0.5, 0.35, 0.25)
    },
    "slimming": {f"slimming, {cut}": CUTS[cut] for cut in ("50 %", "70 %", "0.5x FLOPs")},
}
BATCHES = (1, 64)
ROUNDS, SECONDS = 15, 0.02  # of a network in a round, at least
RUNTIMES = ("torch", "onnxruntime")


def smaller(network: str, group: str, label: str) -> tuple[nn.Module, float]:
    """A network after a cut, and the share of its FLOPs that is left."""
    slimming, example = group == "slimming", torch.zeros(1, 1, 28, 28)
    model = trained(network, 0, slimming=True) if slimming else built(network, 0)
    if group == "whole":
        return model.eval(), 1.0
    options = {**GROUPS[group][label], "measure_latency": False, "floor": FLOOR}
    result = st.channels.prune(model, example, "slimming" if slimming else "l1", **options)
    return fast(result.model).eval(), result.after.flops / result.before.flops


def torch_job(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    """A forward pass."""

    def run() -> None:
        with torch.inference_mode():
            model(x)

    return run


def onnx_job(model: nn.Module, x: Tensor, folder: Path) -> Callable[[], Any]:
    """The same in onnxruntime, on one thread."""
    path = folder / "model.onnx"
    st.export_onnx(model, x, path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    name, given = session.get_inputs()[0].name, np.ascontiguousarray(x.numpy())
    return lambda: session.run(None, {name: given})


def measure(network: str) -> list[common.Record]:
    """A record a smaller network: FLOPs left, milliseconds by runtime and batch, peak memory."""
    cases = [("whole", "whole"), *((g, label) for g, labels in GROUPS.items() for label in labels)]
    models = [smaller(network, *case) for case in cases]
    records: list[common.Record] = [
        {"network": network, "group": group, "label": label, "flops": round(flops, 4)}
        for (group, label), (_, flops) in zip(cases, models, strict=True)
    ]
    for batch in BATCHES:
        x = torch.randn(batch, 1, 28, 28)
        with tempfile.TemporaryDirectory() as folder:
            jobs = {
                "torch": [torch_job(model, x) for model, _ in models],
                "onnxruntime": [onnx_job(model, x, Path(folder)) for model, _ in models],
            }
            for runtime in RUNTIMES:
                times = median_seconds(jobs[runtime], rounds=ROUNDS, seconds=SECONDS)
                for record, seconds in zip(records, times, strict=True):
                    record[f"{runtime}, batch {batch} [ms]"] = round(1e3 * seconds, 4)
    for record in records:
        record["peak [MB]"] = _peak_of(record)
    return records


def _peak_of(record: common.Record) -> float:
    """Megabytes that a process of its own needs above its imports, for a forward pass of 256."""
    case = [record["network"], record["group"], record["label"]]
    command = [sys.executable, "-m", __spec__.name, "--peak", *case]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))


def print_peak(network: str, group: str, label: str) -> None:
    """Run one network, and print the peak of the memory above that before the pass."""
    model, _ = smaller(network, group, label)
    x = torch.randn(256, 1, 28, 28)
    before = peak()
    torch_job(model, x)()
    print(json.dumps(round((peak() - before) / 1e6, 1)))


def table_of(records: Sequence[common.Record]) -> str:
    """Times the dense network is slower, a row a smaller network."""
    dense = records[0]
    columns = [f"{runtime}, batch {batch} [ms]" for runtime in RUNTIMES for batch in BATCHES]
    lines = []
    for record in records:
        cells = [f"{record[c]:.2f} ({dense[c] / record[c]:.2f}x)" for c in columns]
        lines.append([record["label"], f"{record['flops']:.2f}", *cells, record["peak [MB]"]])
    head = ["", "FLOPs left", *columns, "peak memory, batch 256 [MB]"]
    return common.markdown_table(head, lines)


def plot(records: Sequence[common.Record], path: Path) -> None:
    """Share of FLOPs left against share of latency left, a panel a network and batch."""
    figure = plots.new_figure(10.0, 7.5)
    panels = figure.subplots(len(NETWORKS), len(BATCHES), sharex=True, sharey=True, squeeze=False)
    for across, (network, chosen) in zip(panels, NETWORKS.items(), strict=True):
        mine = [record for record in records if record["network"] == network]
        for ax, batch in zip(across, BATCHES, strict=True):
            ax.plot([0, 1], [0, 1], color="#BBBBBB", linewidth=1, label="in proportion")
            for runtime, colour in zip(RUNTIMES, ("#0072B2", "#D55E00"), strict=True):
                for group, style in zip(GROUPS, ("o--", "s-", "^:"), strict=True):
                    key = f"{runtime}, batch {batch} [ms]"
                    shown = [r for r in mine if r["group"] == group or r is mine[0]]
                    shown.sort(key=lambda record: record["flops"])
                    ax.plot(
                        [r["flops"] for r in shown],
                        [r[key] / mine[0][key] for r in shown],
                        style,
                        color=colour,
                        label=f"{runtime}, {group}",
                    )
            ax.set_title(f"{chosen.label}, batch {batch}", loc="left", fontsize=10)
            ax.grid(color="#DDDDDD", linewidth=0.6)
            ax.spines[["top", "right"]].set_visible(False)
    panels[0][0].legend(fontsize=8)
    figure.supxlabel("FLOPs that are left [share of the dense network's]", fontsize=10)
    figure.supylabel("Latency that is left [share]", fontsize=10)
    common.console.print(f"wrote {plots.save(figure, path)}")


def main() -> None:
    """Measure, then write latency.json, the picture and the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak:
        print_peak(*arguments.peak)
        return
    records = [record for network in NETWORKS for record in measure(network)]
    common.write_json(HERE / "latency.json", {"machine": common.machine(), "rows": records})
    plot(records, HERE / "latency.png")
    parts = []
    for network, chosen in NETWORKS.items():
        parts += [f"{chosen.label}:", table_of([r for r in records if r["network"] == network])]
    common.put_into(HERE / "README.md", "\n\n".join(parts), section="latency")


if __name__ == "__main__":
    main()
