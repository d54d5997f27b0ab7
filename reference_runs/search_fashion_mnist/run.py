"""Ratios of channels by every search, at equal FLOPs and at equal latency, before and after tuning.

    python -m reference_runs.search_fashion_mnist.latency --table
    python -m reference_runs.search_fashion_mnist.run --workers 2
    python -m reference_runs.search_fashion_mnist.latency

from the repository's root, the first and the last on a machine with nothing else to do. Finished
runs are kept in results.jsonl, evaluated networks in evaluations/: the same commands go on where
they were stopped. See the README beside this file.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch

import sparsetrain as st
from reference_runs import _common as common
from reference_runs.search_fashion_mnist.networks import (
    HERE,
    data,
    fine_tune,
    metric,
    recalibrated,
    test_error,
    trained,
)

TABLE = HERE / "latency_table.json"
EVALUATIONS = HERE / "evaluations"  # git ignores it
EXAMPLE = torch.zeros(64, 1, 28, 28)  # as large as the batches whose latency counts
TRIALS, POPULATION = 100, 20  # of the evolution
EPISODES, WARMUP = 200, 50  # of AMC
FRONT_TRIALS = 200
#: What the network may cost: label -> target.
TARGETS: dict[str, Callable[[], st.CostTarget]] = {
    "0.5x FLOPs": lambda: st.Flops(0.5),
    "0.3x FLOPs": lambda: st.Flops(0.3),
    "0.6x latency": lambda: st.Latency(0.6, table=TABLE),
    "0.45x latency": lambda: st.Latency(0.45, table=TABLE),
}
#: Other budgets, for the two searches whose measured times are compared.
MORE_TARGETS: dict[str, Callable[[], st.CostTarget]] = {
    "0.7x FLOPs": lambda: st.Flops(0.7),
    "0.4x FLOPs": lambda: st.Flops(0.4),
    "0.75x latency": lambda: st.Latency(0.75, table=TABLE),
    "0.52x latency": lambda: st.Latency(0.52, table=TABLE),
}
METHODS = {
    "uniform": "uniform",
    "sensitivity": "one threshold for all drops",
    "least_loss": "least sum of drops",
    "evolution": "evolution",
    "amc": "AMC",
}
FROM_SENSITIVITY = ("sensitivity", "least_loss")
ON_MORE_TARGETS = ("uniform", "least_loss", "evolution")
#: Of a network's errors: the key in the results, and what the tables call it.
MOMENTS = {"before": "before fine-tuning", "after": "after fine-tuning"}


def channels() -> st.search.Channels:
    """How channels are removed: by their L1 norms, in blocks that a CPU computes at once."""
    return st.search.Channels("l1", round_to=8, floor=0.1)


def sensitivity(seed: int) -> st.search.Sensitivity:
    """Of the trained network, from its evaluations."""
    return st.search.sensitivity(
        trained(seed),
        metric,
        prune=channels(),
        example_inputs=EXAMPLE,
        folder=EVALUATIONS / f"sensitivity-{seed}",
    )


def prepare(job: common.Record, report: common.Report) -> common.Record:
    """Train a network, and measure what its layers bear."""
    model = trained(job["seed"], lambda r: report(job["key"], r.epoch, 4, "training"))
    started = time.perf_counter()
    found = sensitivity(job["seed"])
    return {
        "seed": job["seed"],
        "method": "trained",
        "test_error": test_error(model),
        "validation": found.baseline,
        "sensitivity": found.to_dict(),
        "search_evaluations": found.evaluations,
        "search_seconds": round(time.perf_counter() - started, 1),
    }


def search(job: common.Record, report: common.Report) -> common.Record:
    """One search for one target, and the network that it chose."""
    report(job["key"], 0, 3, "search")
    started = time.perf_counter()
    ratios, knobs, evaluations, evaluating = _searched(job)
    wall = time.perf_counter() - started
    report(job["key"], 1, 3, "fine-tuning")
    validation = metric(knobs.network(ratios))
    model = recalibrated(knobs.network(ratios))
    before = test_error(model)
    fine_tune(model, job["seed"])
    cost = st.search.CostOf(st.Flops(1.0), knobs)
    return {
        **{name: job[name] for name in ("seed", "method", "target")},
        "ratios": knobs.rounded(ratios),
        "validation": validation,
        "before": before,
        "after": test_error(model),
        "flops": round(cost(ratios) / cost.whole, 4),
        "search_evaluations": evaluations,
        "evaluation_seconds": round(evaluating, 1),
        "search_seconds": round(wall, 1),
    }


def find_front(job: common.Record, report: common.Report) -> common.Record:
    """Accuracy against FLOPs in one search, without a target."""
    report(job["key"], 0, 1, "search")
    result = st.search.ratios(
        trained(job["seed"]),
        metric,
        prune=channels(),
        example_inputs=EXAMPLE,
        method="evolution",
        cost=st.Flops(1.0),
        trials=FRONT_TRIALS,
        population=POPULATION,
        folder=EVALUATIONS / job["key"],
        seed=job["seed"],
    )
    result.plot(HERE / "front.png")
    front = [[point.cost, point.metric] for point in result.front]
    seconds = round(result.seconds, 1)
    found = {"front": front, "search_evaluations": len(result.points), "search_seconds": seconds}
    return {"seed": job["seed"], "method": "front", **found}


def _searched(job: common.Record) -> tuple[dict[str, float], st.search.Knobs, int, float]:
    """Ratios, and what they cost: evaluated networks, and seconds of evaluation."""
    model, method, seed = trained(job["seed"]), job["method"], job["seed"]
    target = (TARGETS | MORE_TARGETS)[job["target"]]()
    options: dict[str, Any] = {
        "prune": channels(),
        "example_inputs": EXAMPLE,
        "target": target,
        "folder": EVALUATIONS / job["key"],
        "seed": seed,
    }
    if method in FROM_SENSITIVITY:
        found = sensitivity(seed)
        ratios = found.suggest(target) if method == "sensitivity" else found.optimise(target)
        return ratios, found.knobs, 0, 0.0
    if method == "uniform":
        knobs = channels().bind(model, EXAMPLE)
        cost = st.search.CostOf(target, knobs)
        return st.search.fitted(knobs.uniform(0.5), cost), knobs, 0, 0.0
    if method == "amc":
        result = st.search.amc(model, metric, episodes=EPISODES, warmup=WARMUP, **options)
    else:
        options |= {"trials": TRIALS, "population": POPULATION}
        result = st.search.ratios(model, metric, method=method, **options)
    return result.best.ratios, result.knobs, len(result.points), result.seconds


def networks_to_train(_: Sequence[str], seeds: int) -> list[common.Record]:
    """One a seed."""
    return [{"key": f"trained-{seed}", "seed": seed} for seed in range(seeds)]


def searches(_: Sequence[str], seeds: int) -> list[common.Record]:
    """All searches, those of the first seed first."""
    return [
        {"key": f"{method}-{target}-{seed}", "method": method, "target": target, "seed": seed}
        for seed in range(seeds)
        for targets, methods in ((TARGETS, METHODS), (MORE_TARGETS, ON_MORE_TARGETS))
        for target in targets
        for method in methods
    ]


def fronts(_: Sequence[str], seeds: int) -> list[common.Record]:
    """One, of the first seed."""
    return [{"key": "front-0", "seed": 0}]


def summarise(runs: Sequence[common.Record]) -> list[common.Record]:
    """One row a method and target; errors in percent, and the advantage over uniform by seed."""
    uniform = {(r["target"], r["seed"]): r for r in runs if r["method"] == "uniform"}
    # Two methods start from the same sensitivity, whose evaluations are theirs.
    before = {r["seed"]: r for r in runs if r["method"] == "trained"}
    counted = ("search_evaluations", "search_seconds")
    runs = [
        {**run, **{name: run[name] + before[run["seed"]][name] for name in counted}}
        if run["method"] in FROM_SENSITIVITY
        else run
        for run in runs
    ]
    groups: dict[tuple[str, str], list[common.Record]] = defaultdict(list)
    for run in runs:
        if "target" in run:
            groups[run["target"], run["method"]].append(run)
    whole = [100 * run["test_error"] for run in before.values()]
    mean, error = round(common.mean(whole), 3), round(common.standard_error(whole), 3)
    rows: list[common.Record] = [{"target": "none", "method": "trained", "seeds": len(whole)}]
    rows[0] |= {"before": mean, "before_standard_error": error}
    for (target, method), mine in groups.items():
        row: common.Record = {"target": target, "method": method, "seeds": len(mine)}
        for name in ("before", "after", "flops", "search_evaluations", "search_seconds"):
            scale = 100 if name in MOMENTS else 1
            values = [scale * run[name] for run in mine]
            row[name] = round(common.mean(values), 3)
            row[f"{name}_standard_error"] = round(common.standard_error(values), 3)
        for moment in MOMENTS:
            pairs = [100 * (uniform[target, r["seed"]][moment] - r[moment]) for r in mine]
            row[f"{moment}_advantage"] = common.advantage(pairs)
        rows.append(row)
    return rows


def table_of(rows: Sequence[common.Record], target: str) -> str:
    """A row a method."""
    lines = []
    for method, label in METHODS.items():
        for row in rows:
            if (row["method"], row["target"]) == (method, target):
                gain = row["after_advantage"]
                lines.append(
                    [
                        label,
                        *(f"{row[m]:.2f} ± {row[f'{m}_standard_error']:.2f}" for m in MOMENTS),
                        f"{gain['advantage']:+.2f} ± {gain['standard_error']:.2f}",
                        f"{row['flops']:.3f}",
                        f"{row['search_evaluations']:.0f}",
                        f"{row['search_seconds']:.0f}",
                    ]
                )
    head = ["", *MOMENTS.values(), "better than uniform", "FLOPs"]
    return common.markdown_table([*head, "networks evaluated", "seconds"], lines)


def tables(rows: Sequence[common.Record]) -> str:
    """Everything that goes into the README."""
    whole = next(row for row in rows if row["method"] == "trained")
    parts = [
        f"Test error [%], mean ± standard error over {whole['seeds']} seeds; as trained "
        f"{whole['before']:.2f} ± {whole['before_standard_error']:.2f}."
    ]
    for target in (*TARGETS, *MORE_TARGETS):
        if any(row["target"] == target for row in rows):
            parts += [f"### {target}", table_of(rows, target)]
    return "\n\n".join(parts)


def main() -> None:
    """Run what is missing, then write results.json and the tables."""
    stages = [(networks_to_train, prepare), (searches, search), (fronts, find_front)]
    common.run_study(__doc__, HERE, stages, summarise, tables, begin=data)


if __name__ == "__main__":
    main()
