"""The highest sparsity within half a point of accuracy: LeNet-300-100 and a residual network.

    python -m reference_runs.search_fashion_mnist.max_sparsity --workers 2

from the repository's root. Writes max_sparsity.json and its table.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import nn

import sparsetrain as st
from reference_runs import _common as common
from reference_runs.search_fashion_mnist import networks
from sparsetrain.candidates import choose
from sparsetrain.pruning import PruneResult
from sparsetrain.workbench import evaluate
from sparsetrain.workbench.networks import build

TOLERANCE = 0.005
LENET_EPOCHS, LENET_RATE, TUNING_RATE = 15, 0.05, 0.01
TUNING_EPOCHS = 1
#: How the path goes, and whether networks are tuned before they are evaluated.
PATHS = {
    "uniform": "the same sparsity in every layer",
    "ranked": "one threshold for all magnitudes",
    "tuned": f"the same, after {TUNING_EPOCHS} epoch of fine-tuning",
}


def lenet(seed: int) -> nn.Module:
    """A trained LeNet-300-100."""
    model = build("lenet_300_100", in_shape=(1, 28, 28), classes=10, seed=seed)
    path = networks.CHECKPOINTS / f"lenet-{LENET_EPOCHS}-{seed}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model
    networks.train(model, networks.sgd(model, LENET_RATE), LENET_EPOCHS * networks.EPOCH, seed)
    common.save_weights(model, path)
    return model


def validated(model: nn.Module) -> float:
    """Accuracy on all images that were held out."""
    return evaluate(model, *networks.validation())


def validated_anew(model: nn.Module) -> float:
    """The same after batch normalisations have measured their statistics."""
    return validated(networks.recalibrated(model))


def tuned(model: nn.Module) -> float:
    """Accuracy after a little training, in which zeros stay zeros. The network stays trained."""
    masks = {c.name: c.param.detach() != 0 for c in choose(model, None)}
    optimizer = PruneResult(model, masks, "search").hold(networks.sgd(model, TUNING_RATE))
    networks.train(model, optimizer, TUNING_EPOCHS * networks.EPOCH, seed=0)
    optimizer.finalize()
    return validated(model)


#: Name of a network -> (its label, how it is made, its metric).
NETWORKS = {
    "lenet": ("LeNet-300-100", lenet, validated),
    "resnet": ("ResNet-style", networks.trained, validated_anew),
}


def search(job: common.Record, report: common.Report) -> common.Record:
    """One network and path."""
    _, build_trained, metric = NETWORKS[job["network"]]
    report(job["key"], 0, 2, "training")
    model = build_trained(job["seed"])
    report(job["key"], 1, 2, "search")
    started = time.perf_counter()
    along = "uniform" if job["path"] == "uniform" else "ranked"
    evaluate_ = tuned if job["path"] == "tuned" else metric
    found = st.search.max_sparsity(model, evaluate_, TOLERANCE, along=along)
    seconds = time.perf_counter() - started
    return {
        **{name: job[name] for name in ("network", "path", "seed")},
        "sparsity": round(found.sparsity, 4),
        "baseline": found.baseline,
        "metric": found.metric,
        "again": validated(found.model),  # the returned network itself, as it is
        "tried": [list(point) for point in found.tried],
        "evaluations": found.evaluations,
        "seconds": round(seconds, 1),
        "test_error": networks.test_error(found.model),
        "whole_test_error": networks.test_error(model),
    }


def table_of(runs: list[common.Record]) -> str:
    """A row a network and path."""
    lines = []
    for network, (label, *_) in NETWORKS.items():
        for path, words in PATHS.items():
            mine = [r for r in runs if (r["network"], r["path"]) == (network, path)]
            if not mine:
                continue
            drops = [100 * (run["baseline"] - run["again"]) for run in mine]
            errors = [
                " / ".join(f"{100 * run[name]:.2f}" for run in mine)
                for name in ("whole_test_error", "test_error")
            ]
            lines.append(
                [
                    label,
                    words,
                    " / ".join(f"{100 * run['sparsity']:.1f}" for run in mine),
                    " / ".join(f"{drop:.2f}" for drop in drops),
                    *errors,
                    " / ".join(str(run["evaluations"]) for run in mine),
                    " / ".join(f"{run['seconds']:.0f}" for run in mine),
                ]
            )
    head = ["network", "path", "zeros [%]", "validation drop", "test error, whole", "pruned"]
    return common.markdown_table([*head, "evaluations", "seconds"], lines)


def main() -> None:
    """Run what is missing, then write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    log = common.ResultLog(networks.HERE / "max_sparsity.jsonl")
    every = [
        {"key": f"{network}-{path}-{seed}", "network": network, "path": path, "seed": seed}
        for seed in range(arguments.seeds)
        for network in NETWORKS
        for path in PATHS
        if (network, path) != ("resnet", "tuned")  # two minutes a network
    ]
    runs = common.run_jobs(every, search, log, workers=arguments.workers)
    result = {"machine": common.machine(), "tolerance": TOLERANCE, "runs": runs}
    common.write_json(networks.HERE / "max_sparsity.json", result)
    common.put_into(networks.HERE / "README.md", table_of(runs), section="max_sparsity")


if __name__ == "__main__":
    main()
