"""Perplexities by method and pattern, who is ahead of whom, and both as tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from reference_runs import _common as common
from reference_runs.char_transformer.methods import METHODS, PATTERNS

#: Perplexity by (seed of training, seed of calibration); the second is None where no data are used.
Values = Mapping[tuple[int, int | None], float]

#: (expected to be better, worse)
PAIRS = (
    ("wanda", "magnitude"),
    ("sparsegpt", "wanda"),
    ("wanda", "wanda_at_once"),
    ("magnitude_owl", "magnitude"),
    ("wanda_owl", "wanda"),
    ("sparsegpt_owl", "sparsegpt"),
)


def per_seed(values: Values) -> list[float]:
    """What a standard error is over.

    With one trained network a value for each draw of calibration windows; with several the mean
    over the draws for each network.
    """
    by_network: dict[int, list[float]] = defaultdict(list)
    for (seed, _), value in values.items():
        by_network[seed].append(value)
    if len(by_network) == 1:
        return next(iter(by_network.values()))
    return [common.mean(found) for found in by_network.values()]


def grouped(runs: Iterable[common.Record]) -> dict[tuple[str, str], Values]:
    """The perplexities of each method and pattern."""
    groups: dict[tuple[str, str], dict[tuple[int, int | None], float]] = defaultdict(dict)
    for run in runs:
        seeds = (run["seed"], run["calibration"])
        groups[run["method"], run["pattern"]][seeds] = run["perplexity"]
    return dict(groups)


def summarise(runs: list[common.Record]) -> list[common.Record]:
    """One row a method and pattern."""
    rows = []
    for (method, pattern), values in grouped(runs).items():
        mine = [run for run in runs if (run["method"], run["pattern"]) == (method, pattern)]
        found = per_seed(values)
        rows.append(
            {
                "method": method,
                "pattern": pattern,
                "sparsity": round(common.mean([run["sparsity"] for run in mine]), 5),
                "perplexity": round(common.mean(found), 4),
                "standard_error": round(common.standard_error(found), 4),
                "seeds": len(found),
            }
        )
    return rows


def advantages(runs: list[common.Record]) -> list[common.Record]:
    """How far the perplexity of one method is below another's, paired by both seeds."""
    groups = grouped(runs)
    rows = []
    for better, worse in PAIRS:
        for pattern in PATTERNS:
            mine, other = groups.get((better, pattern)), groups.get((worse, pattern))
            if not mine or not other:
                continue
            gaps = {}
            for (seed, draw), value in mine.items():
                beside = other.get((seed, draw), other.get((seed, None)))
                if beside is not None:
                    gaps[seed, draw] = beside - value
            if gaps:
                names = {"better": better, "worse": worse, "pattern": pattern}
                rows.append({**names, **common.advantage(per_seed(gaps))})
    return rows


def tables(rows: list[common.Record], gaps: list[common.Record]) -> str:
    """Perplexities and advantages as Markdown."""
    found = {(row["method"], row["pattern"]): row for row in rows}
    dense = found.get(("dense", "dense"))
    shown = []
    if dense:
        shown.append(["Dense", *([_words(dense, "perplexity")] * len(PATTERNS))])
    for method, chosen in METHODS.items():
        mine = [found.get((method, pattern)) for pattern in PATTERNS]
        if any(mine):
            cells = [_words(row, "perplexity") if row else "" for row in mine]
            shown.append([chosen.label, *cells])
    by_pair = {(gap["better"], gap["worse"], gap["pattern"]): gap for gap in gaps}
    pairs = []
    for better, worse in PAIRS:
        ahead = [by_pair.get((better, worse, pattern)) for pattern in PATTERNS]
        if any(ahead):
            cells = [_words(gap, "advantage", sign="+") if gap else "" for gap in ahead]
            pairs.append([f"{METHODS[better].label} over {METHODS[worse].label}", *cells])
    header = ["", *PATTERNS]
    return "\n\n".join(
        (
            "Perplexity of a character of the validation text, mean ± standard error:",
            common.markdown_table(header, shown),
            "How much lower the perplexity of the first is, paired by seeds:",
            common.markdown_table(header, pairs),
        )
    )


def _words(row: common.Record, field: str, *, sign: str = "") -> str:
    """With its standard error, if there is more than one seed."""
    error = f" ± {row['standard_error']:.3f}" if row["seeds"] > 1 else ""
    return f"{row[field]:{sign}.3f}{error}"
