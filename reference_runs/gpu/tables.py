"""The results as Markdown."""

from __future__ import annotations

from typing import Any

from reference_runs import _common as common

#: The goal: a step between updates, as a multiple of the bare optimizer's.
GOAL = 1.01


def tables(results: common.Record) -> str:
    """Everything measured, under the name of the device."""
    machine = results["machine"]
    parts = [f"Measured on {machine['device']}, torch {machine['torch']}, {results['date'][:10]}."]
    runs = results["runs"]
    for section, table in (("steps", _steps), ("updates", _updates), ("2:4", _products)):
        rows = [run for run in runs if run["section"] == section and "skipped" not in run]
        skipped = {r["skipped"] for r in runs if r["section"] == section and "skipped" in r}
        parts += [table(rows)] if rows else []
        parts += [f"Not measured: {reason}." for reason in sorted(skipped)]
    parts += [f"Failed: {failure}" for failure in results["failed"]]
    return "\n\n".join(parts)


def _steps(rows: list[common.Record]) -> str:
    head = ["step, as a multiple of the bare one", "optimizer", "precision", "bare [ms]", "ratio"]
    head += ["95 % interval", f"at most {GOAL}"]
    return common.markdown_table(
        head,
        [
            [
                row["workload"],
                row["optimizer"],
                row["precision"],
                _number(row["dense_ms"], 2),
                f"**{_number(row['ratio'], 3)}**",
                "{:.3f} to {:.3f}".format(*row["ratio"]["interval_95"]),
                _verdict(row["ratio"]["interval_95"]),
            ]
            for row in rows
        ],
    )


def _updates(rows: list[common.Record]) -> str:
    head = ["one mask update", "policy", "[ms]", "training steps", "training, one in 100 steps"]
    return common.markdown_table(
        head,
        [
            [
                row["workload"],
                row["policy"],
                _number(row["update_ms"], 2),
                _number(row["update_in_training_steps"], 2),
                f"{row['amortised']:.4f}",
            ]
            for row in rows
        ],
    )


def _products(rows: list[common.Record]) -> str:
    head = ["2:4 product", "dtype", "rows", "dense [ms]", "speed-up"]
    head += ["largest error", "that of dense"]
    lines: list[list[Any]] = []
    for row in rows:
        for layer in row["layers"]:
            errors = layer["largest_error"]
            mark = "" if layer["is_accurate"] else " (too large)"
            lines.append(
                [
                    " x ".join(map(str, layer["inputs_outputs"])),
                    row["dtype"],
                    row["tokens"],
                    _number(layer["dense_ms"], 3),
                    f"**{_number(layer['speed_up'], 2)}**",
                    f"{errors['sparse']:.1e}{mark}",
                    f"{errors['dense']:.1e}",
                ]
            )
    return common.markdown_table(head, lines)


def _verdict(interval: list[float]) -> str:
    low, high = interval
    return "yes" if high <= GOAL else "no" if low > GOAL else "open"


def _number(value: common.Record, digits: int) -> str:
    low, high = value["quartiles"]
    return f"{value['median']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
