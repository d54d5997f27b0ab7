"""What is compared, and the tables of its results."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from reference_runs import _common as common

#: Share kept of the weights of the encoder's Linear layers -> seeds.
KEPT = {0.50: 1, 0.15: 3, 0.05: 3}

LABELS = {
    "dense": "Dense",
    "movement": "Movement, soft",
    "hard_movement": "Movement, hard",
    "gradual": "Magnitude, each matrix",
    "gradual_global": "Magnitude, all matrices",
    "bag": "No encoder: bag of word pieces",
}
SPARSE = ("movement", "hard_movement", "gradual", "gradual_global")
#: Runs that only say what happens; one seed is enough.
ONE_SEED = ("hard_movement", "gradual_global")
#: (movement, magnitude)
PAIRS = (("movement", "gradual"), ("movement", "gradual_global"), ("hard_movement", "gradual"))


def summarise(runs: list[common.Record]) -> list[common.Record]:
    """One row a method and share of weights kept; accuracies in percent."""
    groups: dict[tuple[str, float], list[common.Record]] = defaultdict(list)
    for run in runs:
        groups[run["method"], run["kept"]].append(run)
    rows = []
    for method in LABELS:
        for kept in sorted({k for m, k in groups if m == method}, reverse=True):
            mine = groups[method, kept]
            accuracies = [100 * run["test_accuracy"] for run in mine]
            rows.append(
                {
                    "method": method,
                    "kept": kept,
                    "seeds": len(mine),
                    "test_accuracy": round(common.mean(accuracies), 2),
                    "standard_error": round(common.standard_error(accuracies), 2),
                }
            )
    return rows


def advantages(runs: list[common.Record]) -> list[common.Record]:
    """How far movement is above magnitude, paired by seed, in percentage points."""
    found = {(r["method"], r["kept"], r["seed"]): 100 * r["test_accuracy"] for r in runs}
    rows = []
    for movement, magnitude in PAIRS:
        for kept in sorted({run["kept"] for run in runs}, reverse=True):
            gaps = [
                value - found[magnitude, kept, seed]
                for (method, share, seed), value in found.items()
                if (method, share) == (movement, kept) and (magnitude, kept, seed) in found
            ]
            if gaps:
                names = {"better": movement, "worse": magnitude, "kept": kept}
                rows.append({**names, **common.advantage(gaps)})
    return rows


def tables(rows: list[common.Record], gaps: list[common.Record]) -> str:
    """Accuracies and advantages as Markdown."""
    found = {(row["method"], row["kept"]): row for row in rows}
    head = [f"{100 * kept:g} % kept" for kept in KEPT]

    def cells(method: str, write: Callable[[common.Record], str]) -> list[str]:
        whole = found.get((method, 1.0))  # dense and bag: one value whatever is kept
        mine = [found.get((method, kept), whole) for kept in KEPT]
        return [LABELS[method], *(write(row) if row else "" for row in mine)]

    def percent(row: common.Record) -> str:
        return _mean_of(row, "test_accuracy")

    present = [method for method in LABELS if any(row["method"] == method for row in rows)]
    by_pair = {(gap["better"], gap["worse"], gap["kept"]): gap for gap in gaps}
    pairs = []
    for movement, magnitude in PAIRS:
        mine = [by_pair.get((movement, magnitude, kept)) for kept in KEPT]
        if not any(mine):
            continue
        words = [_mean_of(gap, "advantage", sign="+") if gap else "" for gap in mine]
        pairs.append([f"{LABELS[movement]} over {LABELS[magnitude].lower()}", *words])
    parts = (
        ("Test accuracy [%], mean ± standard error", [cells(m, percent) for m in present]),
        ("Advantage in test accuracy [percentage points], paired by seed", pairs),
    )
    return "\n\n".join(f"{t}:\n\n" + common.markdown_table(["", *head], body) for t, body in parts)


def _mean_of(row: common.Record, field: str, *, sign: str = "") -> str:
    """With its standard error, if there is more than one seed."""
    error = f" ± {row['standard_error']:.2f}" if row["seeds"] > 1 else ""
    return f"{row[field]:{sign}.2f}{error}"
