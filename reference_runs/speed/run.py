"""What sparse training costs on top of the bare optimizer: steps, mask updates, memory.

    python -m reference_runs.speed.run                 # everything, about 9 minutes
    python -m reference_runs.speed.run --only update

from the repository's root, on a machine that does nothing else. See the README beside this file.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from reference_runs import _common as common
from reference_runs.speed import zeros
from reference_runs.speed.contenders import OPTIMIZERS, WORKLOADS, Workload, make
from sparsetrain.workbench import load

HERE = Path(__file__).parent
BARE, OURS = "bare optimizer", "sparsetrain"
PEERS = ("rigl-torch", "torch.nn.utils.prune")
UPDATED = Workload("mlp", 128, 2, (2600, 2600))  # 8.8 million weights


def interleaved(
    jobs: dict[str, Callable[[], None]], *, rounds: int, seconds: float, warm_up: int = 15
) -> dict[str, list[float]]:
    """Seconds a call of each job, one number a round.

    Every round runs all jobs in turn, beginning with another one each time, for `seconds` each, so
    that what else the machine does hits all of them.
    """
    calls = {}
    for name, job in jobs.items():
        for _ in range(warm_up):
            job()
        calls[name] = max(1, round(seconds / _time(job, 3)))
    times: dict[str, list[float]] = {name: [] for name in jobs}
    names = list(jobs)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            times[name].append(_time(jobs[name], calls[name]))
    return times


def _time(job: Callable[[], None], calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        job()
    return (time.perf_counter() - started) / calls


def ratio(times: list[float], reference: list[float]) -> common.Record:
    """Median of the round-by-round ratios, with quartiles."""
    ratios = [a / b for a, b in zip(times, reference, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"ratio": round(middle, 4), "quartiles": [round(low, 4), round(high, 4)]}


# (a) steps


def measure_steps(rounds: int, seconds: float) -> list[common.Record]:
    """A training step between mask updates against the same step with the bare optimizer."""
    dataset = load("fashion_mnist")
    rows = []
    for workload_name, workload in WORKLOADS.items():
        torch.set_num_threads(workload.threads)
        for optimizer in OPTIMIZERS:
            peers = PEERS if workload_name.startswith("MLP") and " " not in optimizer else ()
            jobs = {
                library: make(library, workload, optimizer, dataset).train_step
                for library in (BARE, OURS, *peers)
            }
            times = interleaved(jobs, rounds=rounds, seconds=seconds)
            row = {
                "workload": workload_name,
                "optimizer": optimizer,
                "threads": workload.threads,
                "bare_ms": round(1e3 * statistics.median(times[BARE]), 3),
                **{name: ratio(times[name], times[BARE]) for name in (OURS, *peers)},
            }
            rows.append(row)
            common.console.print(row)
            del jobs
            gc.collect()
    return rows


# (b) mask updates


def measure_updates(rounds: int) -> list[common.Record]:
    """One mask update of an MLP with 8.8 million weights against one dense training step."""
    dataset = load("fashion_mnist")
    torch.set_num_threads(UPDATED.threads)
    bare, ours, peer = (make(n, UPDATED, "SGD", dataset) for n in (BARE, OURS, "rigl-torch"))

    def our_update() -> None:
        ours.handle.update_masks()

    def their_update() -> None:
        peer.handle._rigl_step()

    def prepare_theirs() -> None:
        peer.backward()
        for weight, hook in zip(peer.handle.W, peer.handle.backward_hook_objects, strict=True):
            if hook is not None:
                hook.dense_grad = weight.grad.clone()

    times: dict[str, list[float]] = {"dense step": [], OURS: [], "rigl-torch": []}
    for number in range(rounds + 2):
        measured = {"dense step": _time(bare.train_step, 5)}
        ours.train_step()
        ours.backward()
        measured[OURS] = _time(our_update, 1)
        peer.train_step()
        prepare_theirs()
        measured["rigl-torch"] = _time(their_update, 1)
        if number >= 2:  # the first rounds warm up
            for name, value in measured.items():
                times[name].append(value)
    step = times["dense step"]
    row = {
        "weights": sum(t.numel for t in ours.handle.targets.values()),
        "sparsity": round(ours.handle.sparsity(), 4),
        "dense_step_ms": round(1e3 * statistics.median(step), 2),
        "ours_in_steps": ratio(times[OURS], step),
        "rigl_torch_in_steps": ratio(times["rigl-torch"], step),
        "rigl_torch_over_ours": ratio(times["rigl-torch"], times[OURS]),
    }
    common.console.print(row)
    return [row]


# (c) memory


def measure_memory(repeats: int) -> list[common.Record]:
    """Peak memory of whole processes, bare and wrapped; the difference a sparsified weight."""
    # Blocks above 1 MiB go back to the system when they are freed, so that the peak is what was
    # needed at once and not what the allocator kept for later.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    rows = []
    for optimizer in ("SGD", "AdamW"):
        peaks: dict[str, list[int]] = {}
        for _ in range(repeats):
            for case in ("bare", "steps", "updates"):
                command = [sys.executable, "-m", "reference_runs.speed.peak", case, optimizer]
                result = subprocess.run(
                    command, capture_output=True, text=True, check=True, env=environment
                )
                answer = json.loads(result.stdout)
                peaks.setdefault(case, []).append(answer["peak_bytes"])
        weights = answer["weights"]
        bare = statistics.median(peaks["bare"])
        row = {
            "optimizer": optimizer,
            "weights": weights,
            "bare_bytes_a_weight": round(bare / weights, 3),
            **{
                f"{case}_extra_bytes_a_weight": round(
                    (statistics.median(peaks[case]) - bare) / weights, 3
                )
                for case in ("steps", "updates")
            },
        }
        rows.append(row)
        common.console.print(row)
    return rows


# Tables.


def tables(results: common.Record) -> str:
    """Everything measured, as Markdown."""
    parts = []
    if steps := results.get("steps"):
        rows = []
        for row in steps:
            peers = ", ".join(f"{n} {row[n]['ratio']:.2f}" for n in PEERS if n in row)
            low, high = row[OURS]["quartiles"]
            rows.append(
                [
                    row["workload"],
                    row["optimizer"],
                    f"{row['bare_ms']:.2f}",
                    f"**{row[OURS]['ratio']:.3f}** ({low:.3f} to {high:.3f})",
                    peers,
                ]
            )
        head = ["step, as a multiple of the bare one", "optimizer", "bare [ms]", OURS, "peers"]
        parts.append(common.markdown_table(head, rows))
    if updates := results.get("updates"):
        row = updates[0]
        head = [f"one mask update, {row['weights'] / 1e6:.1f} M weights", "dense training steps"]
        rows = [
            [OURS, f"**{row['ours_in_steps']['ratio']:.2f}**"],
            ["rigl-torch 0.5.2", f"{row['rigl_torch_in_steps']['ratio']:.1f}"],
            ["rigl-torch over sparsetrain", f"{row['rigl_torch_over_ours']['ratio']:.0f}"],
        ]
        parts.append(common.markdown_table(head, rows))
    if memory := results.get("memory"):
        head = ["bytes a sparsified weight", "bare optimizer", "on top: steps", "with updates"]
        rows = [
            [
                row["optimizer"],
                f"{row['bare_bytes_a_weight']:.2f}",
                f"**{row['steps_extra_bytes_a_weight']:.2f}**",
                f"{row['updates_extra_bytes_a_weight']:.2f}",
            ]
            for row in memory
        ]
        parts.append(common.markdown_table(head, rows))
    if zero := results.get("zeros"):
        head = ["what zeros cost", "[ms]"]
        parts.append(
            common.markdown_table(head, [[row["what"], f"{row['ms']:.2f}"] for row in zero])
        )
    return "\n\n".join(parts)


def main() -> None:
    """Measure, then write results.json and the tables in the README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", choices=["steps", "updates", "memory", "zeros"])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--seconds", type=float, default=0.4, help="of a round, for each library")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the results")
    arguments = parser.parse_args()
    path = arguments.out / "results.json"
    results: common.Record = json.loads(path.read_text()) if path.exists() else {}
    parts: dict[str, Callable[[], list[common.Record]]] = {
        "steps": lambda: measure_steps(arguments.rounds, arguments.seconds),
        "updates": lambda: measure_updates(arguments.rounds),
        "memory": lambda: measure_memory(3),
        "zeros": zeros.measure,
    }
    for name, measure in parts.items():
        if arguments.only in (None, name):
            results[name] = measure()
            results["machine"] = common.machine()
            common.write_json(path, results)
    common.console.print(tables(results), soft_wrap=True, markup=False)
    if arguments.out == HERE:
        common.put_into(HERE / "README.md", tables(results))


if __name__ == "__main__":
    main()
