"""Lottery tickets on Fashion-MNIST, and iterative pruning against one-shot pruning.

    python -m reference_runs.lottery_fashion_mnist.run --workers 2

from the repository's root. Every training run is kept on disk, so the same command goes on where it
was stopped. See the README beside this file.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsetrain as st
from reference_runs import _common as common
from sparsetrain.workbench import Dataset, build, load
from sparsetrain.workbench.training import evaluate

HERE = Path(__file__).parent
BATCH = 60
#: Six epochs of 55,000 images.
STEPS = 5500
#: Adam's, as for LeNet-300-100 in Frankle & Carbin 2019, appendix G.
LEARNING_RATE = 1.2e-3
#: Steps between looks at the validation loss.
LOOK_EVERY = 100

ROUNDS = 8
#: The last layer loses half as much, as in the paper.
RATE = {"fc3.*": 0.2, "*": 0.4}
REWINDS = (0, 500)
CONTROLS: tuple[Literal["fresh", "random"], ...] = ("fresh", "random")
NETWORKS = {"ticket": "ticket", "fresh": "same mask, fresh weights", "random": "random mask"}

#: Pruning of a trained network: sparsities, rounds, and steps of fine-tuning in all rounds.
SPARSITIES = (0.9, 0.95, 0.98, 0.99)
IN_ROUNDS = (1, 8)
FINE_TUNING = 7200


@cache
def data() -> tuple[Dataset, Tensor, Tensor]:
    """All images; the places of 55,000 to train on and of 5,000 to stop early by."""
    dataset = load("fashion_mnist")
    order = torch.randperm(len(dataset.train_x), generator=torch.Generator().manual_seed(0))
    return dataset, order[:55_000], order[55_000:]


def network(seed: int) -> nn.Module:
    """A fresh LeNet-300-100."""
    return build("lenet_300_100", in_shape=data()[0].in_shape, classes=10, seed=seed)


@torch.no_grad()
def validation_loss(model: nn.Module) -> float:
    """Mean loss over the 5,000 images that are not trained on."""
    dataset, _, held_out = data()
    model.eval()
    loss = F.cross_entropy(model(dataset.train_x[held_out]), dataset.train_y[held_out])
    model.train()
    return float(loss)


class Training:
    """A training function: Adam at a constant rate, batches drawn in an order of the seed."""

    def __init__(self, seed: int, steps: int, after: Callable[[st.TrainingRun], None]) -> None:
        self.steps, self.after = steps, after
        self.order = torch.Generator().manual_seed(seed)

    def __call__(self, run: st.TrainingRun) -> common.Record:
        dataset, training, _ = data()
        model = run.model
        optimizer = run.hold(torch.optim.Adam(model.parameters(), lr=LEARNING_RATE))
        best, stopped_at, when_stopped = float("inf"), 0, 1.0
        model.train()
        for step in run.steps(self.steps, optimizer, self.order):
            index = training[torch.randint(len(training), (BATCH,), generator=self.order)]
            loss = F.cross_entropy(model(dataset.train_x[index]), dataset.train_y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if (step + 1) % LOOK_EVERY == 0 and (found := validation_loss(model)) < best:
                best, stopped_at, when_stopped = found, step + 1, test_error(model)
        optimizer.finalize()
        self.after(run)
        return {
            "test_error": test_error(model),
            "stopped_at": stopped_at,
            "test_error_when_stopped": when_stopped,
        }


def find_tickets(job: common.Record, report: common.Report) -> common.Record:
    """One seed: rounds of pruning and rewinding, with both controls."""
    runs = 1 + ROUNDS * (1 + len(CONTROLS))
    done = itertools.count(1)

    def after(run: st.TrainingRun) -> None:
        report(job["key"], next(done), runs, f"round {run.number} {run.control or ''}")

    result = st.prune_iteratively(
        Training(job["seed"], STEPS, after),
        network(job["seed"]),
        rounds=ROUNDS,
        rate=RATE,
        rewind_to=job["rewind_to"],
        controls=CONTROLS,
        folder=HERE / "rounds" / job["key"],
        seed=job["seed"],
    )
    return {**job, "runs": result.to_list()}


def prune_trained(job: common.Record, report: common.Report) -> common.Record:
    """One seed: a trained network to several sparsities, in one round and in many."""
    done = itertools.count(1)
    trainings = 1 + len(SPARSITIES) * sum(IN_ROUNDS)

    def after(run: st.TrainingRun) -> None:
        report(job["key"], next(done), trainings, "")

    seed, runs = job["seed"], []
    trained = network(seed)
    dense = Training(seed, STEPS, after)(st.TrainingRun(trained, whole(trained), 0))
    for sparsity, rounds in itertools.product(SPARSITIES, IN_ROUNDS):
        result = st.prune_iteratively(
            Training(seed, FINE_TUNING // rounds, after),
            copy.deepcopy(trained),
            rounds=rounds,
            rate=1 - (1 - sparsity) ** (1 / rounds),
            trained=True,
            scope="global",
            seed=seed,
        )
        runs.append({"rounds": rounds, "asked": sparsity, **result.to_list()[-1]})
    return {**job, "dense": dense, "runs": runs}


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Masks that prune nothing."""
    return {
        n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters() if p.dim() > 1
    }


def test_error(model: nn.Module) -> float:
    """Share of test images whose label is missed."""
    dataset = data()[0]
    return 1 - evaluate(model, dataset.test_x, dataset.test_y)


def train(job: common.Record, report: common.Report) -> common.Record:
    """One job."""
    return (find_tickets if "rewind_to" in job else prune_trained)(job, report)


def jobs_of(seeds: int) -> list[common.Record]:
    """Tickets of each step and seed, then pruning of trained networks."""
    jobs: list[common.Record] = [
        {"key": f"tickets-{step}-{seed}", "rewind_to": step, "seed": seed}
        for seed in range(seeds)
        for step in REWINDS
    ]
    return jobs + [{"key": f"trained-{seed}", "seed": seed} for seed in range(seeds)]


def ticket_rows(records: Sequence[common.Record]) -> list[common.Record]:
    """One row a step, network and round, over the seeds; errors in percent."""
    groups: dict[tuple[int, str, int], list[common.Record]] = defaultdict(list)
    for record in records:
        for run in record["runs"] if "rewind_to" in record else ():
            groups[record["rewind_to"], run["control"] or "ticket", run["round"]].append(run)
    rows = []
    for (step, name, number), runs in groups.items():
        errors = [100 * run["metrics"]["test_error"] for run in runs]
        stopped = [100 * run["metrics"]["test_error_when_stopped"] for run in runs]
        rows.append(
            {
                "rewind_to": step,
                "network": name,
                "round": number,
                "kept": round(1 - runs[0]["sparsity"], 5),
                "seeds": len(runs),
                "test_error": round(common.mean(errors), 3),
                "standard_error": round(common.standard_error(errors), 3),
                "test_error_when_stopped": round(common.mean(stopped), 3),
                "stopped_at": round(common.mean([r["metrics"]["stopped_at"] for r in runs])),
            }
        )
    return rows


def trained_rows(records: Sequence[common.Record]) -> list[common.Record]:
    """One row a number of rounds and sparsity, over the seeds; errors in percent."""
    groups: dict[tuple[int, float], list[common.Record]] = defaultdict(list)
    for record in records:
        for run in record["runs"] if "rewind_to" not in record else ():
            groups[run["rounds"], run["asked"]].append(run)
    rows = []
    for (rounds, asked), runs in groups.items():
        errors = [100 * run["metrics"]["test_error"] for run in runs]
        rows.append(
            {
                "rounds": rounds,
                "sparsity": asked,
                "seeds": len(runs),
                "test_error": round(common.mean(errors), 3),
                "standard_error": round(common.standard_error(errors), 3),
            }
        )
    return rows


def write(records: list[common.Record]) -> None:
    """results.json and the tables of the README."""
    tickets, trained = ticket_rows(records), trained_rows(records)
    result = {"machine": common.machine(), "tickets": tickets, "trained": trained, "runs": records}
    common.write_json(HERE / "results.json", result)
    parts = []
    for step in REWINDS:
        mine = {(r["network"], r["round"]): r for r in tickets if r["rewind_to"] == step}
        if not mine:
            continue
        lines = [
            [f"{100 * mine['ticket', n]['kept']:.1f}", *(cell(mine.get((w, n))) for w in NETWORKS)]
            for n in range(ROUNDS + 1)
        ]
        heads = ["weights kept [%]", *NETWORKS.values()]
        parts += [
            f"Rewound to step {step}, test error [%]:",
            "",
            common.markdown_table(heads, lines),
        ]
        parts.append("")
    if trained:
        found = {(row["rounds"], row["sparsity"]): row for row in trained}
        lines = [
            [f"{rounds} rounds" if rounds > 1 else "one-shot"]
            + [cell(found.get((rounds, s))) for s in SPARSITIES]
            for rounds in IN_ROUNDS
        ]
        heads = ["", *(f"{100 * s:g} %" for s in SPARSITIES)]
        parts += ["A trained network, equal fine-tuning in all, test error [%]:", ""]
        parts.append(common.markdown_table(heads, lines))
    common.put_into(HERE / "README.md", "\n".join(parts))


def cell(row: common.Record | None) -> str:
    """Mean and standard error."""
    return f"{row['test_error']:.2f} ± {row['standard_error']:.2f}" if row else ""


def main() -> None:
    """Run what is missing, then write results.json and the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only-write", action="store_true", help="tables of the finished runs")
    arguments = parser.parse_args()
    log = common.ResultLog(HERE / "results.jsonl")
    if not arguments.only_write:
        data()
        common.run_jobs(jobs_of(arguments.seeds), train, log, workers=arguments.workers)
    write(log.read())


if __name__ == "__main__":
    main()
