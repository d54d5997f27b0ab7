"""Predicted against measured latency of random networks: channels and sparsities.

    python -m reference_runs.speed.latency_prediction                 # about 5 minutes
    python -m reference_runs.speed.latency_prediction --only resnet-64
    python -m reference_runs.speed.latency_prediction --again         # nothing of an earlier run
    python -m reference_runs.speed.latency_prediction --tables        # without measuring
    python -m reference_runs.speed.latency_prediction --processor-time    # if others work here

from the repository's root, on a machine that does nothing else. What an interrupted run has
measured is kept. See the README beside this file.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import statistics
import sys
import time
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cache
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import sparsetrain as st
from reference_runs import _common as common
from reference_runs.channels_fashion_mnist.networks import built, fast
from sparsetrain.channels.removal import remove
from sparsetrain.report import plots

HERE = Path(__file__).parent
RESULTS, PICTURE = HERE / "latency_prediction.json", HERE / "latency_prediction.png"
#: Tables and single measurements of a run that is not finished; git ignores it.
KEPT = HERE / "checkpoints" / "latency_prediction"
BUSY = (
    "Measured in processor time of the thread, on a machine that was busy with other work: what "
    "others do to the caches still counts. To be measured again on an idle one."
)
CONFIGURATIONS, STEP = 40, 8
#: Of a pair of networks: rounds, and seconds of a round at least. Weights of several megabytes are
#: in the third-level cache only after many calls.
ROUNDS, SECONDS = 3, 0.05
TURNS = 3  # over all configurations; of which the median is taken
#: glibc keeps freed memory. It would give it back in ways that depend on what ran before, and
#: zeroing pages anew takes up to a third of a pass.
KEEP_FREED = {"MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(4 << 30)}
GOALS = {"error": 0.08, "correlation": 0.95}


class Case(NamedTuple):
    label: str
    batch: int
    network: Callable[[], nn.Module]
    change: Callable[[nn.Module, Tensor, random.Random], nn.Module]


# Networks.


def mlp(*sizes: int) -> nn.Module:
    """Linear layers with ReLU between them, with new weights."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (inputs, outputs) in enumerate(pairwise(sizes), start=1):
        layers[f"fc{number}"] = nn.Linear(inputs, outputs)
        if number < len(sizes) - 1:
            layers[f"relu{number}"] = nn.ReLU()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(layers)


def random_widths(model: nn.Module, x: Tensor, generator: random.Random) -> nn.Module:
    """A copy in which every coupling has some multiple of 8 channels."""
    smaller, found = copy.deepcopy((model, st.channels.couplings(model, x[:1])))
    kept = {c.name: generator.choice(range(STEP, c.channels + 1, STEP)) for c in found}
    gone = {c.name: c.removable(range(c.channels), c.channels - kept[c.name]) for c in found}
    remove(gone, found, None)
    return fast(smaller)


def random_sparsities(model: nn.Module, x: Tensor, generator: random.Random) -> nn.Module:
    """A copy whose layers have random zeros: half of them up to 99 %, half of them 90 to 99 %."""
    sparse = copy.deepcopy(model)
    for layer in sparse.modules():
        if isinstance(layer, nn.Linear):
            sparsity = generator.uniform(generator.choice((0.0, 0.9)), 0.99)
            chosen = torch.Generator().manual_seed(generator.getrandbits(32))
            with torch.no_grad():
                layer.weight[torch.rand(layer.weight.shape, generator=chosen) < sparsity] = 0
    return sparse


CASES = {
    "resnet-64": Case("ResNet-style, channels", 64, lambda: built("resnet", 0), random_widths),
    "resnet-1": Case("ResNet-style, channels", 1, lambda: built("resnet", 0), random_widths),
    "vgg-64": Case("VGG-style, channels", 64, lambda: built("vgg", 0), random_widths),
    "vgg-1": Case("VGG-style, channels", 1, lambda: built("vgg", 0), random_widths),
    "lenet-64": Case(
        "LeNet-300-100, sparsities", 64, lambda: mlp(784, 300, 100, 10), random_sparsities
    ),
    "mlp-64": Case(
        "MLP 784-1024-1024-10, sparsities", 64, lambda: mlp(784, 1024, 1024, 10), random_sparsities
    ),
    "mlp-1": Case(
        "MLP 784-1024-1024-10, sparsities", 1, lambda: mlp(784, 1024, 1024, 10), random_sparsities
    ),
}


# Measuring.


def inputs_of(case: Case) -> Tensor:
    """A batch of noise: images, or pixels in a row."""
    generator = torch.Generator().manual_seed(0)
    sizes = (784,) if case.change is random_sparsities else (1, 28, 28)
    return torch.randn(case.batch, *sizes, generator=generator)


def measure(key: str) -> None:
    """Make the table of a case, and time every configuration in turn with the whole network."""
    case, log = CASES[key], common.ResultLog(KEPT / f"{key}.jsonl")
    model, x = case.network().eval(), inputs_of(case)
    KEPT.mkdir(parents=True, exist_ok=True)
    table = st.cost.latency_table(model, x, step=STEP, path=KEPT / f"{key}.json", progress=True)
    done = {record["key"] for record in log.read()}
    for turn in range(TURNS):
        generator = random.Random(1)
        for number in range(CONFIGURATIONS):
            smaller = case.change(model, x, generator).eval()
            if f"{turn}-{number}" in done:
                continue
            predicted, smaller = table.predict(smaller, x), table.compress(smaller)
            whole, seconds = st.cost.latency([model, smaller], x, rounds=ROUNDS, seconds=SECONDS)
            times = {"predicted": predicted, "measured": seconds, "whole": whole}
            reference = table.networks[0].total
            log.append({"key": f"{turn}-{number}", **times, "whole in the table": reference})


def turns_of(key: str) -> list[list[common.Record]]:
    """What was measured of each configuration, in each turn."""
    records = {r["key"]: r for r in common.ResultLog(KEPT / f"{key}.jsonl").read()}
    numbers = range(CONFIGURATIONS)
    return [[records[f"{turn}-{number}"] for number in numbers] for turn in range(TURNS)]


@cache
def summary(key: str) -> common.Record:
    """What a case has come to; times in milliseconds."""
    case, turns = CASES[key], turns_of(key)
    predicted = [1e3 * record["predicted"] for record in turns[0]]
    raw = [[1e3 * record["measured"] for record in turn] for turn in turns]
    # The machine as fast as it was when the table was made.
    even = [
        [1e3 * r["measured"] * r["whole in the table"] / r["whole"] for r in turn] for turn in turns
    ]
    measured, untouched = (
        [statistics.median(column) for column in zip(*times, strict=True)] for times in (even, raw)
    )
    repeats = [rank_correlation(*pair) for pair in combinations(even, 2)]
    return {
        "key": key,
        "network": case.label,
        "batch": case.batch,
        "configurations": len(predicted),
        "error": round(error(predicted, measured), 4),
        "largest error": round(error(predicted, measured, max), 4),
        "correlation": round(rank_correlation(predicted, measured), 4),
        "correlation of two turns": round(statistics.fmean(repeats), 4),
        "error without the reference": round(error(predicted, untouched), 4),
        "correlation without the reference": round(rank_correlation(predicted, untouched), 4),
        "predicted [ms]": [round(value, 4) for value in predicted],
        "measured [ms]": [round(value, 4) for value in measured],
    }


def error(
    predicted: Sequence[float],
    measured: Sequence[float],
    over: Callable[[list[float]], float] = statistics.median,
) -> float:
    """Relative error, the median over networks."""
    return over([abs(p / m - 1) for p, m in zip(predicted, measured, strict=True)])


def rank_correlation(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Spearman's; equal numbers share the mean of their ranks."""
    ranks = []
    for values in (predicted, measured):
        ordered = sorted(values)
        ranks.append([bisect_left(ordered, v) + bisect_right(ordered, v) for v in values])
    return statistics.correlation(*ranks)


# Tables.


def table_of(rows: Sequence[common.Record]) -> str:
    """A row a network and batch."""
    lines = []
    for row in rows:
        times = row["measured [ms]"]
        lines.append(
            [
                row["network"],
                row["batch"],
                row["configurations"],
                f"{min(times):.3g} to {max(times):.3g}",
                f"**{row['error']:.1%}**",
                f"{row['largest error']:.1%}",
                f"**{row['correlation']:.3f}**",
                f"{row['correlation of two turns']:.3f}",
                f"{row['error without the reference']:.1%}",
                f"{row['correlation without the reference']:.3f}",
            ]
        )
    head = ["", "batch", "networks", "measured [ms]", "median error", "largest error"]
    head += ["rank correlation", "of two turns", "error, raw", "correlation, raw"]
    goal = f"The goal is a median error of {GOALS['error']:.0%} at most and a rank correlation of "
    return f"{common.markdown_table(head, lines)}\n\n{goal}{GOALS['correlation']} at least."


def plot(rows: Sequence[common.Record], path: Path) -> None:
    """Predicted against measured, a panel a network and batch."""
    figure = plots.new_figure(11.0, 5.6)
    panels = figure.subplots(2, -(-len(rows) // 2), squeeze=False).flat
    for ax in panels[len(rows) :]:
        ax.set_visible(False)
    for ax, row in zip(panels, rows, strict=False):
        both = [*row["predicted [ms]"], *row["measured [ms]"]]
        ends = [0.95 * min(both), 1.05 * max(both)]
        ax.plot(ends, ends, color="#BBBBBB", linewidth=1)
        ax.plot(row["measured [ms]"], row["predicted [ms]"], "o", color="#0072B2", markersize=4)
        ax.set_title(f"{row['network']}\nbatch {row['batch']}", loc="left", fontsize=9)
        ax.grid(color="#DDDDDD", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in list(panels)[len(rows) :]:
        ax.set_visible(False)
    figure.supxlabel("Measured [ms]", fontsize=10)
    figure.supylabel("Predicted [ms]", fontsize=10)
    common.console.print(f"wrote {plots.save(figure, path)}")


def restart_keeping_memory() -> None:
    """Begin anew with an allocator that keeps what was freed."""
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        command = [sys.executable, "-m", "reference_runs.speed.latency_prediction", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **KEEP_FREED})


def main() -> None:
    """Measure, then write latency_prediction.json, the picture and the table in the README."""
    global KEPT
    restart_keeping_memory()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--again", action="store_true", help="forget what was measured before")
    parser.add_argument("--tables", action="store_true", help="write again what is measured")
    parser.add_argument("--processor-time", action="store_true", help="instead of the wall clock's")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.processor_time:  # of the thread that computes; torch has no other here
        time.perf_counter = time.thread_time
        KEPT = KEPT.with_name(f"{KEPT.name}_processor_time")
    for key in [] if arguments.tables else arguments.only:
        if arguments.again:
            for path in (KEPT / f"{key}.json", KEPT / f"{key}.jsonl"):
                path.unlink(missing_ok=True)
        measure(key)
        row = summary(key)
        common.console.print({k: v for k, v in row.items() if not k.endswith("[ms]")})
    rows: list[Any] = [summary(key) for key in CASES if (KEPT / f"{key}.jsonl").exists()]
    clock = "processor time" if arguments.processor_time else "wall"
    common.write_json(
        RESULTS, {"machine": common.machine() | {"threads": 1}, "clock": clock, "rows": rows}
    )
    plot(rows, PICTURE)
    text = table_of(rows) + (f"\n\n{BUSY}" if arguments.processor_time else "")
    common.put_into(HERE / "README.md", text, section="latency prediction")


if __name__ == "__main__":
    main()
