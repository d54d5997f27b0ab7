"""Networks on Fashion-MNIST that learn from what they were before they were pruned.

    python -m reference_runs.distill_fashion_mnist.run --workers 2

from the repository's root. Finished runs are kept in results.jsonl and trained networks in
one_shot_fashion_mnist/checkpoints/, so the same command goes on where it was stopped. See the
README beside this file.
"""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import sparsetrain as st
from reference_runs import _common as common
from reference_runs.distill_fashion_mnist.methods import (
    CNN,
    CUTS,
    LENET,
    METHODS,
    RULE,
    RULES,
    batches,
    cuts_of,
    shown,
)
from reference_runs.one_shot_fashion_mnist.networks import BATCH, NETWORKS, RATE, data, sgd, trained
from sparsetrain.workbench import evaluate
from sparsetrain.workbench.training import EpochRecord

HERE = Path(__file__).parent
#: Epochs after pruning, the same for every method.
EPOCHS = {LENET: 5, CNN: 2}
#: Rules are compared for these methods of LeNet-300-100, at one sparsity.
WITH_RULES, RULED_CUT = ("plain", "logits"), "95"


def error_of(model: nn.Module) -> float:
    """Test error as a fraction."""
    return round(1 - evaluate(model, data().test_x, data().test_y), 4)


def train(job: common.Record, report: common.Report) -> common.Record:
    """Train a dense network, the teacher and what is pruned."""
    epochs = NETWORKS[job["network"]].epochs

    def tell(record: EpochRecord) -> None:
        report(job["key"], record.epoch, epochs, f"test {100 * record.test_accuracy:.1f} %")

    model = trained(job["network"], job["seed"], tell)
    named = {name: job[name] for name in ("network", "cut", "method", "rule", "seed")}
    return {**named, "test_error": error_of(model)}


def fine_tune(job: common.Record, report: common.Report) -> common.Record:
    """Prune a trained network, and train what is left."""
    network, seed = job["network"], job["seed"]
    torch.manual_seed(seed)  # of projections
    teacher = trained(network, seed)
    example = data().train_x[:2]
    student, masks = CUTS[job["cut"]].make(copy.deepcopy(teacher), example)
    before = error_of(student if masks is None else masks.apply())
    distillation = METHODS[job["method"]].loss(network, student, teacher, example)
    extra = [] if distillation is None else [*distillation.parameters()]
    optimizer: Any = sgd(student, RATE)
    if extra:
        optimizer.add_param_group({"params": extra})
    if masks is not None:
        optimizer = masks.hold(optimizer)
    first, total = _lengths(network)
    finetune = RULES[job["rule"]][1].model_copy(update={"steps": total})
    scheduler = finetune.scheduler(
        optimizer,
        first,
        lambda one: torch.optim.lr_scheduler.CosineAnnealingLR(one, first),
    )
    started = time.process_time()
    _learn(student, optimizer, scheduler, distillation, job, report)
    seconds = time.process_time() - started
    if masks is not None:
        optimizer.finalize()
    parts = {} if distillation is None else distillation.parts
    weights = [p for p in student.parameters() if p.dim() > 1]
    named = {name: job[name] for name in ("network", "cut", "method", "rule", "seed")}
    return {
        **named,
        "before": before,
        "test_error": error_of(student),
        "zeros": sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights),
        "parameters": sum(p.numel() for p in student.parameters()),
        "train_seconds": round(seconds, 2),
        "last_parts": {name: round(float(part), 5) for name, part in parts.items()},
    }


def _learn(
    student: nn.Module,
    optimizer: Any,
    scheduler: Any,
    distillation: st.Distillation | None,
    job: common.Record,
    report: common.Report,
) -> None:
    """All epochs after the cut."""
    student.train()
    epochs, images, labels = EPOCHS[job["network"]], data().train_x, data().train_y
    for epoch in range(epochs):
        report(job["key"], epoch, epochs, "")
        for index in batches(len(images), BATCH, job["seed"], epoch):
            x, y = images[index], labels[index]
            outputs = student(x)
            loss = distillation(outputs, x, y) if distillation else F.cross_entropy(outputs, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()


def _lengths(network: str) -> tuple[int, int]:
    """Steps of the original training, and after pruning."""
    an_epoch = len(data().train_x) // BATCH
    return NETWORKS[network].epochs * an_epoch, EPOCHS[network] * an_epoch


def dense_jobs(networks: Sequence[str], seeds: int) -> list[common.Record]:
    """Networks to train."""
    return [
        _job(network, "none", "dense", "", seed) for seed in range(seeds) for network in networks
    ]


def tuning_jobs(networks: Sequence[str], seeds: int) -> list[common.Record]:
    """All runs after pruning, those of the first seed first."""
    jobs = []
    for seed in range(seeds):
        for network in networks:
            for cut in cuts_of(network):
                jobs += [_job(network, cut, method, RULE, seed) for method in shown(network)]
                if network == LENET and cut == RULED_CUT:
                    rules = [rule for rule in RULES if rule != RULE]
                    jobs += [
                        _job(network, cut, m, rule, seed) for m in WITH_RULES for rule in rules
                    ]
    return jobs


def _job(network: str, cut: str, method: str, rule: str, seed: int) -> common.Record:
    names = (network, cut, method, rule, str(seed))
    key = "-".join(name for name in names if name)
    return {
        "key": key,
        "network": network,
        "cut": cut,
        "method": method,
        "rule": rule,
        "seed": seed,
    }


Key = tuple[str, str, str, str]


def key_of(record: common.Record) -> Key:
    """What a row of the results is about."""
    return record["network"], record["cut"], record["method"], record["rule"]


def summarise(runs: Sequence[common.Record]) -> list[common.Record]:
    """One row a network, cut, method and rule; errors in percent.

    `advantage` is how much lower the error is than with labels alone, paired by seed.
    """
    groups: dict[Key, dict[int, common.Record]] = defaultdict(dict)
    for run in runs:
        groups[key_of(run)][run["seed"]] = run
    rows = []
    for (network, cut, method, rule), mine in groups.items():
        row: common.Record = {"network": network, "cut": cut, "method": method, "rule": rule}
        row["seeds"] = len(mine)
        for name in ("before", "test_error"):
            errors = [100 * run[name] for run in mine.values() if name in run]
            if errors:
                row[name] = round(common.mean(errors), 3)
                row[f"{name}_standard_error"] = round(common.standard_error(errors), 3)
        if method != "dense":
            plain = groups[network, cut, "plain", rule]
            pairs = [
                100 * (plain[s]["test_error"] - run["test_error"])
                for s, run in mine.items()
                if s in plain
            ]
            if pairs and method != "plain":
                row["advantage"] = common.advantage(pairs)
            row["train_seconds"] = round(
                common.mean([r["train_seconds"] for r in mine.values()]), 1
            )
        rows.append(row)
    return rows


def cell(row: common.Record | None, name: str = "test_error") -> str:
    """Mean and standard error; empty where nothing was measured."""
    if row is None or name not in row:
        return ""
    return f"{row[name]:.2f} ± {row[f'{name}_standard_error']:.2f}"


def gain(row: common.Record | None) -> str:
    """Advantage over labels alone."""
    if row is None or "advantage" not in row:
        return ""
    found = row["advantage"]
    return f"{found['advantage']:+.2f} ± {found['standard_error']:.2f}"


def table_of(rows: Sequence[common.Record], network: str) -> str:
    """A row a method, two columns a cut."""
    mine = {key_of(row): row for row in rows}
    cuts = cuts_of(network)
    head = ["", *(label for cut in cuts for label in (CUTS[cut].label, "better by")), "CPU s"]
    befores = [mine.get((network, cut, "plain", RULE)) for cut in cuts]
    lines = [["Straight after the cut", *_flat([[cell(r, "before"), ""] for r in befores]), ""]]
    for name in shown(network):
        found = [mine.get((network, cut, name, RULE)) for cut in cuts]
        if any(found):
            seconds = next((f"{row['train_seconds']:.0f}" for row in found if row), "")
            cells = _flat([[cell(row), gain(row)] for row in found])
            lines.append([METHODS[name].label, *cells, seconds])
    return common.markdown_table(head, lines)


def table_of_rules(rows: Sequence[common.Record]) -> str:
    """LeNet-300-100: a row a rule, a column a method."""
    mine = {key_of(row): row for row in rows}
    lines = []
    for rule, (label, _) in RULES.items():
        found = [mine.get((LENET, RULED_CUT, method, rule)) for method in WITH_RULES]
        lines.append([label, *map(cell, found), gain(found[-1])])
    return common.markdown_table(["", *(METHODS[m].label for m in WITH_RULES), "better by"], lines)


def _flat(lists: Sequence[Sequence[str]]) -> list[str]:
    return [entry for part in lists for entry in part]


def tables(rows: Sequence[common.Record]) -> str:
    """Everything that goes into the README."""
    parts = []
    for network in NETWORKS:
        dense = [row for row in rows if row["network"] == network and row["method"] == "dense"]
        if not dense:
            continue
        parts.append(f"### {NETWORKS[network].label}")
        parts.append(
            f"Test error [%], mean ± standard error; dense {cell(dense[0])}. {EPOCHS[network]} "
            "epochs after the cut. Better by: points less than with labels alone, paired by seed."
        )
        parts.append(table_of(rows, network))
    if any(row["rule"] not in ("", RULE) for row in rows):
        parts.append(f"### Learning rates, LeNet-300-100, {CUTS[RULED_CUT].label}")
        parts.append(table_of_rules(rows))
    return "\n\n".join(parts)


def main() -> None:
    """Run what is missing, then write results.json and the tables."""
    stages = [(dense_jobs, train), (tuning_jobs, fine_tune)]
    common.run_study(__doc__, HERE, stages, summarise, tables, begin=data, networks=NETWORKS)


if __name__ == "__main__":
    main()
