"""One-shot pruning of a character transformer: magnitude, Wanda, SparseGPT and OWL.

    python -m reference_runs.char_transformer.run --workers 2

from the repository's root. Finished runs are kept in results-STEPS.jsonl and the network in
checkpoints/, so the same command goes on where it was stopped. See the README beside this file.
"""

from __future__ import annotations

import argparse
import math
import time
from copy import deepcopy
from dataclasses import asdict
from functools import partial
from pathlib import Path

from reference_runs import _common as common
from reference_runs.char_transformer import data
from reference_runs.char_transformer.methods import METHODS, PATTERNS, prune
from reference_runs.char_transformer.model import CharTransformer
from reference_runs.char_transformer.tables import advantages, summarise, tables
from reference_runs.char_transformer.training import (
    Settings,
    calibration,
    fit,
    network,
    trained,
    validation_loss,
)

HERE = Path(__file__).parent


# Jobs.


def train(job: common.Record, report: common.Report) -> common.Record:
    """Train one network; the dense row of the table."""
    settings, folder = Settings(**job["settings"]), Path(job["folder"])
    model, losses, seconds = fit(folder, settings, job["seed"], partial(report, job["key"]))
    tenth = max(settings.steps // 10, 1)
    means = [common.mean(losses[i : i + tenth]) for i in range(0, len(losses), tenth)]
    return {
        "method": "dense",
        "pattern": "dense",
        "seed": job["seed"],
        "calibration": None,
        **measured(model, settings),
        "losses": [round(mean, 4) for mean in means],
        "step_seconds": round(seconds / settings.steps, 4),
        "settings": job["settings"],
        "data": data.load().digest,
    }


def prune_one(job: common.Record, report: common.Report) -> common.Record:
    """Prune a copy of a trained network in one way."""
    settings, folder = Settings(**job["settings"]), Path(job["folder"])
    model = trained(folder, settings, job["seed"])
    windows = calibration(settings, job["calibration"] or 0)
    started = time.perf_counter()
    copy = deepcopy(model)
    prune(copy, METHODS[job["method"]], PATTERNS[job["pattern"]], windows).apply()
    seconds = time.perf_counter() - started
    return {
        "method": job["method"],
        "pattern": job["pattern"],
        "seed": job["seed"],
        "calibration": job["calibration"],
        **measured(copy, settings),
        "prune_seconds": round(seconds, 2),
        "settings": job["settings"],
        "data": data.load().digest,
    }


def measured(model: CharTransformer, settings: Settings) -> common.Record:
    """Perplexity, and what is left of the weights that may be pruned, counted in the model."""
    weights = model.prunable()
    kept = {name: int(weight.count_nonzero()) for name, weight in weights.items()}
    loss = validation_loss(model, settings)
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "sparsity": 1 - sum(kept.values()) / sum(w.numel() for w in weights.values()),
        "densities": {name: round(kept[name] / w.numel(), 4) for name, w in weights.items()},
    }


def training_jobs(settings: Settings, seeds: int, folder: Path) -> list[common.Record]:
    """One network a seed."""
    shared = {"settings": asdict(settings), "folder": str(folder)}
    return [{"key": f"dense-{seed}", "seed": seed, **shared} for seed in range(seeds)]


def pruning_jobs(
    settings: Settings, methods: list[str], seeds: int, draws: int, folder: Path
) -> list[common.Record]:
    """Every method, pattern and draw of calibration windows, for every network."""
    return [
        {
            "key": "-".join([method, pattern.replace(" ", ""), str(seed), str(draw)]),
            "method": method,
            "pattern": pattern,
            "seed": seed,
            "calibration": draw if METHODS[method].looks_at_data else None,
            "settings": asdict(settings),
            "folder": str(folder),
        }
        for seed in range(seeds)
        for draw in range(draws)
        for method in methods
        for pattern in PATTERNS
        if METHODS[method].takes(pattern) and (draw == 0 or METHODS[method].looks_at_data)
    ]


# Results.


def write(runs: list[common.Record], settings: Settings, out: Path, workers: int) -> None:
    """results.json and the tables of the README."""
    rows, gaps, text, model = summarise(runs), advantages(runs), data.load(), network(settings)
    result = {
        "experiment": "one-shot pruning of a character transformer on Python's standard library",
        "settings": asdict(settings),
        "data": {
            "digest": text.digest,
            "train_characters": len(text.train),
            "validation_characters": len(text.validation),
            "train_files": text.files[0],
            "validation_files": text.files[1],
            "vocabulary": text.vocabulary,
        },
        "weights": {
            "all": sum(weight.numel() for weight in model.parameters()),
            "pruned": sum(weight.numel() for weight in model.prunable().values()),
        },
        "machine": {**common.machine(), "threads": "1 a run", "workers": workers},
        "table": rows,
        "advantages": gaps,
        "runs": [{key: run[key] for key in run if key != "settings"} for run in runs],
    }
    common.write_json(out / "results.json", result)
    common.console.print(tables(rows, gaps), soft_wrap=True, markup=False)
    if out == HERE:
        common.put_into(HERE / "README.md", tables(rows, gaps))


def main() -> None:
    """Train and prune what is missing, then write results.json and the tables in the README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--seeds", type=int, default=1, help="networks that are trained")
    parser.add_argument("--calibrations", type=int, default=3, help="draws of windows a network")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument(
        "--windows", type=int, default=Settings.validation_windows, help="of the validation text"
    )
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the results")
    arguments = parser.parse_args()
    settings = Settings(steps=arguments.steps, validation_windows=arguments.windows)
    out, workers = arguments.out, arguments.workers
    folder = out / "checkpoints"
    log = common.ResultLog(out / f"results-{settings.steps}.jsonl")
    common.run_jobs(training_jobs(settings, arguments.seeds, folder), train, log, workers=workers)
    grid = pruning_jobs(
        settings, arguments.methods, arguments.seeds, arguments.calibrations, folder
    )
    common.run_jobs(grid, prune_one, log, workers=workers)
    runs = log.read()  # those of earlier calls too, which may have had other methods or seeds
    common_ground = (asdict(settings), data.load().digest)
    if stale := [run["key"] for run in runs if (run["settings"], run["data"]) != common_ground]:
        raise SystemExit(
            f"{log.path.name} has runs with other settings or text, {', '.join(stale)}: move it "
            "away, or give another --out"
        )
    write(runs, settings, out, workers)


if __name__ == "__main__":
    main()
