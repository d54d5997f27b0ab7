"""What curvature, SparseGPT and Wanda cost, in passes of the network that they are made for.

    python -m reference_runs.speed.curvature                 # about 10 minutes
    python -m reference_runs.speed.curvature --only fisher
    python -m reference_runs.speed.curvature --quick         # does it run? writes nothing

from the repository's root, on a machine that does nothing else. See the README beside this file.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsetrain as st
from reference_runs import _common as common
from reference_runs.speed import curvature_jobs as work
from reference_runs.speed.curvature_jobs import BACKPACK, NETWORKS, OPACUS, Job
from reference_runs.speed.peak import peak
from reference_runs.speed.run import interleaved, ratio
from sparsetrain.pruning.surgeon import inverse_root, surgery
from sparsetrain.selection import select

HERE = Path(__file__).parent
RESULTS = HERE / "curvature.json"
OURS, PASS = "sparsetrain", "forward and backward"
#: A call with several batches, in as many passes.
BATCHES = 4
OURS_OF_MANY, PASSES = f"{BATCHES} batches", f"{BATCHES} passes"
#: Of the GGN diagonals in backward passes, of pruning one layer in forward passes.
GOALS = {"exact": "10", "one probe": "1.6", "SparseGPT": "2", "Wanda": "about 0.06"}
#: The layer that is pruned, and the tokens that go through it.
INPUTS, TOKENS = 2048, 4096


class Effort(NamedTuple):
    rounds: int
    seconds: float

    def time(self, jobs: Mapping[str, Job | None], units: list[str]) -> common.Record:
        """Milliseconds of the units, and all other jobs in each unit; None for missing ones."""
        there = {name: job for name, job in jobs.items() if job}
        times = interleaved(there, rounds=self.rounds, seconds=self.seconds, warm_up=1)
        found: common.Record = {}
        for unit in units:
            found[f"{unit} [ms]"] = round(1e3 * statistics.median(times[unit]), 2)
            found[f"in {unit}"] = {
                name: ratio(times[name], times[unit]) if job else None
                for name, job in jobs.items()
                if name not in units
            }
        return found


# (a) diagonals


def measure_fisher(effort: Effort) -> list[common.Record]:
    """The empirical Fisher diagonal of one batch and of several, everything included."""
    return [in_a_fresh_process(fisher_of, name, effort) for name in NETWORKS]


def fisher_of(name: str, effort: Effort) -> common.Record:
    network = NETWORKS[name]
    model, x, y = work.made(network)
    ours = work.fisher(model, x, y)
    peers: dict[str, Job | None] = {"vmap": work.fisher(model, x, y, "vmap")}
    if BACKPACK in network.peers:
        peers[BACKPACK] = work.backpack("SumGradSquared", model, x, y)
    if OPACUS in network.peers:
        peers[OPACUS] = work.opacus(model, x, y)
    work.check_same(ours, peers)
    jobs = {
        PASS: work.forward_and_backward(model, x, y),
        OURS: ours,
        **peers,
        PASSES: work.forward_and_backward(model, x, y, BATCHES),
        OURS_OF_MANY: work.fisher(model, x, y, batches=BATCHES),
    }
    found = effort.time(jobs, [PASS, PASSES])
    return {"network": network.label, "goal": network.goal, **found}


def measure_ggn(effort: Effort) -> list[common.Record]:
    """The GGN diagonal of one batch, exact and with one probe."""
    return [in_a_fresh_process(ggn_of, name, effort) for name in ("mlp", "cnn")]


def ggn_of(name: str, effort: Effort) -> common.Record:
    model, x, y = work.made(NETWORKS[name])
    exact = work.ggn(model, x, y, "exact")
    theirs = work.backpack("DiagGGNExact", model, x, y)
    work.check_same(exact, {BACKPACK: theirs})
    jobs: dict[str, Job | None] = {
        PASS: work.forward_and_backward(model, x, y),
        "backward": work.backward(model, x, y),
        "exact": exact,
        "one probe": work.ggn(model, x, y, "monte_carlo"),
        f"{BACKPACK}, exact": theirs,
        f"{BACKPACK}, one probe": work.backpack("DiagGGNMC", model, x, y),
    }
    return {"network": NETWORKS[name].label, **effort.time(jobs, [PASS, "backward"])}


def in_a_fresh_process(
    measure: Callable[[str, Effort], common.Record], name: str, effort: Effort
) -> common.Record:
    """Memory that the allocator has kept of other networks changes times by up to a third."""
    context, threads = multiprocessing.get_context("spawn"), torch.get_num_threads()
    with ProcessPoolExecutor(1, context, torch.set_num_threads, (threads,)) as pool:
        found = pool.submit(measure, name, effort).result()
    common.console.print(found)
    return found


# (b) memory


def measure_memory(effort: Effort) -> list[common.Record]:
    """Highest resident size of whole processes, each of which makes two Fisher diagonals."""
    # Blocks above 1 MiB go back to the system when they are freed, so that the peak is what was
    # needed at once and not what the allocator kept for later.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    rows = []
    for name in ("mlp", "cnn"):
        row: common.Record = {"network": NETWORKS[name].label}
        for who in (PASS, OURS, BACKPACK):
            command = [sys.executable, "-m", "reference_runs.speed.curvature"]
            command += ["--threads", str(torch.get_num_threads()), "--peak", who, name]
            found = [
                json.loads(
                    subprocess.run(
                        command, capture_output=True, text=True, check=True, env=environment
                    ).stdout
                )
                for _ in range(min(effort.rounds, 3))
            ]
            row[who] = sorted(found)[len(found) // 2] if None not in found else None
        common.console.print(row)
        rows.append(row)
    return rows


def print_peak(who: str, name: str) -> None:
    """In a process of its own: megabytes at most, in all and above the libraries; or null."""
    makers: dict[str, Callable[..., Job | None]] = {
        PASS: work.forward_and_backward,
        OURS: work.fisher,
        BACKPACK: partial(work.backpack, "SumGradSquared"),
    }
    tiny = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 2))
    first = makers[who](tiny, torch.randn(4, 1, 5, 5), torch.zeros(4, dtype=torch.int64))
    if first is None:
        print("null")
        return
    first()  # loads what is loaded when it is needed
    before = peak()
    job = makers[who](*work.made(NETWORKS[name])) or first
    for _ in range(2):
        job()
    print(json.dumps([peak() / 1e6, (peak() - before) / 1e6]))


# (c) pruning of one layer


def measure_pruning(effort: Effort) -> list[common.Record]:
    """SparseGPT and Wanda at 50 % on one layer, in forward passes of that layer."""
    torch.manual_seed(0)
    layer = nn.Linear(INPUTS, INPUTS, bias=False).requires_grad_(False)
    x = torch.randn(TOKENS, INPUTS) @ torch.randn(INPUTS, INPUTS)  # inputs that go together
    weight, half, two_four = layer.weight, INPUTS * INPUTS // 2, st.NM(n=2, m=4)
    hessian, norms = x.T @ x, x.norm(dim=0)

    def ours(keep: Any) -> Tensor:
        return surgery(weight, inverse_root(hessian, 0.01, name="layer"), keep, name="layer")[0]

    def rows() -> Tensor:
        return select((weight * norms).abs_(), half, st.ConstantFanIn())

    def sorted_rows() -> Tensor:
        return work.published_rows((weight * norms).abs_(), 0.5)

    def error(pruned: Tensor) -> float:
        return float(F.linear(x, weight - pruned).norm() / layer(x).norm())

    theirs = work.published_surgery(weight, hessian, 0.5)
    errors = {"ours": error(ours(half)), "published": error(theirs)}
    if abs(errors["ours"] / errors["published"] - 1) > 0.01 or not rows().equal(sorted_rows()):
        raise SystemExit(f"not what the authors' code gives: {errors}")
    jobs: dict[str, Job | None] = {
        "forward": lambda: layer(x),
        "SparseGPT": lambda: ours(half),
        "SparseGPT, 2:4": lambda: ours(two_four),
        "its inverse root alone": lambda: inverse_root(hessian, 0.01, name="layer"),
        "SparseGPT, the authors' way": lambda: work.published_surgery(weight, hessian, 0.5),
        "the Hessian that both need": lambda: x.T @ x,
        "Wanda": rows,
        "Wanda, its score alone": lambda: (weight * norms).abs_(),
        "Wanda, the authors' way": sorted_rows,
        "st.prune by Wanda, with the tokens' pass": lambda: st.prune(
            layer, "wanda", 0.5, calibration=[x], match="weight"
        ),
    }
    row = {"errors": errors, **effort.time(jobs, ["forward"])}
    common.console.print(row)
    return [row]


# Tables.


def _cell(value: common.Record | None, *, bold: bool = False) -> str:
    if value is None:
        return "not installed"
    low, high = value["quartiles"]
    middle = f"**{value['ratio']:.2f}**" if bold else f"{value['ratio']:.2f}"
    return f"{middle} ({low:.2f} to {high:.2f})"


def tables(results: common.Record) -> str:
    """Everything measured, as Markdown."""
    parts = []
    if rows := results.get("fisher"):
        peers = ["vmap", BACKPACK, OPACUS]
        lines = []
        for row in rows:
            found = row[f"in {PASS}"]
            others = [_cell(found[peer]) if peer in found else "" for peer in peers]
            ms, goal = f"{row[f'{PASS} [ms]']:.1f}", row["goal"] or ""
            of_many = _cell(row[f"in {PASSES}"][OURS_OF_MANY], bold=True)
            ours = _cell(found[OURS], bold=True)
            lines.append([row["network"], ms, ours, of_many, goal, *others])
        head = [
            "Fisher diagonal, in forward and backward passes",
            "pass [ms]",
            f"{OURS}, one batch",
        ]
        head += [f"{OURS}, {OURS_OF_MANY}", "goal"]
        parts.append(common.markdown_table([*head, *peers], lines))
    if rows := results.get("ggn"):
        lines = [
            [f"{row['network']}: {name}", GOALS.get(name, "")]
            + [_cell(row[f"in {unit}"][name], bold=name in GOALS) for unit in ("backward", PASS)]
            for row in rows
            for name in row["in backward"]
        ]
        head = ["GGN diagonal", "goal", "in backward passes", "in forward and backward passes"]
        parts.append(common.markdown_table(head, lines))
    if rows := results.get("memory"):
        cases = (PASS, OURS, BACKPACK)
        lines = [
            [row["network"]]
            + [f"{row[who][0]:.0f} ({row[who][1]:.0f})" if row[who] else "" for who in cases]
            for row in rows
        ]
        head = ["peak memory, Fisher diagonal [MB], and above the libraries", *cases]
        parts.append(common.markdown_table(head, lines))
    if rows := results.get("pruning"):
        found = rows[0]["in forward"]
        lines = [[n, _cell(v, bold=n in GOALS), GOALS.get(n, "")] for n, v in found.items()]
        head = [f"one layer {INPUTS} x {INPUTS}", f"forward passes of {TOKENS} tokens", "goal"]
        parts.append(common.markdown_table(head, lines))
        errors = rows[0]["errors"]
        parts.append(
            f"SparseGPT's relative error on the tokens: {errors['ours']:.4f}, the authors' way "
            f"{errors['published']:.4f}."
        )
    return "\n\n".join(parts)


SECTIONS: dict[str, Callable[[Effort], list[common.Record]]] = {
    "fisher": measure_fisher,
    "ggn": measure_ggn,
    "memory": measure_memory,
    "pruning": measure_pruning,
}


def main() -> None:
    """Measure, then write curvature.json and the tables in the README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", default=list(SECTIONS), choices=SECTIONS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.5, help="of a round, for each contender")
    parser.add_argument("--quick", action="store_true", help="few rounds; writes nothing")
    parser.add_argument("--only-write", action="store_true", help="tables of the last run")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        print_peak(*arguments.peak)
        return
    quick = arguments.quick
    effort = Effort(2, 0.0) if quick else Effort(arguments.rounds, arguments.seconds)
    results: common.Record = {}
    if RESULTS.exists() and not quick:
        results = json.loads(RESULTS.read_text(encoding="utf-8"))
    for name in [] if arguments.only_write else arguments.only:
        results[name] = SECTIONS[name](effort)
        results["machine"] = common.machine() | {"threads": arguments.threads}
        if not quick:
            common.write_json(RESULTS, results)
    common.console.print(tables(results), soft_wrap=True, markup=False)
    if not quick:
        common.put_into(HERE / "README.md", tables(results), section="curvature")


if __name__ == "__main__":
    main()
