"""SET on Fashion-MNIST as in the IJCAI 2019 tutorial: dense, SET and fixed random sparsity.

    python -m reference_runs.set_fashion_mnist.run --workers 2

from the repository's root. Finished runs are kept in results.jsonl and interrupted ones in
checkpoints/, so the same command goes on where it was stopped. See the README beside this file.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsetrain as st
from reference_runs import _common as common
from sparsetrain.keeping import whole_file
from sparsetrain.workbench import Dataset, load

HERE = Path(__file__).parent
METHODS = ("dense", "set", "static")
TRAIN_ACCURACY_EVERY = 20  # epochs; a checkpoint is written as often

#: Test accuracy [%] after the last epoch, by seed, in the authors' files (Pretrained_results).
PUBLISHED_LAST = {
    "dense": [82.3, 81.8, 81.7, 82.2, 81.9],
    "set": [82.6, 83.6, 83.1, 81.2, 82.3],
    "static": [81.1, 80.9, 79.8, 81.1, 80.1],
}
#: Mean over seeds of the best epoch's test accuracy, from the same files.
PUBLISHED_BEST = {"dense": 84.00, "set": 83.72, "static": 81.62}
#: Mean training accuracy [%] after the last epoch.
PUBLISHED_TRAIN = {"dense": 99.59, "set": 91.79, "static": 87.51}


@dataclass(frozen=True)
class Settings:
    """The tutorial's settings; learning rates are for gradients averaged over the batch."""

    epochs: int = 400
    batch_size: int = 40
    train_samples: int = 2000
    test_samples: int = 1000
    widths: tuple[int, ...] = (784, 1000, 1000, 1000, 10)
    epsilon: int = 13
    zeta: float = 0.3
    weight_std: float = 0.1
    momentum: float = 0.9
    decay: float = 2e-4
    dropout: float = 0.2
    sparse_lr: float = 0.05
    # The dense script's rate is 0.001, but it sums weight gradients over the batch of 40 while it
    # averages those of the biases.
    dense_weight_lr: float = 0.04
    dense_bias_lr: float = 0.001

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch; a remainder is dropped."""
        return self.train_samples // self.batch_size

    @property
    def total_steps(self) -> int:
        """Optimizer steps of one run."""
        return self.epochs * self.steps_per_epoch


class TutorialMLP(nn.Module):
    """The tutorial's network: ReLU layers with its own kind of dropout."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.dropout = settings.dropout
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(settings.widths))
        for weight in self.weights:
            nn.init.normal_(weight, std=settings.weight_std)
        for bias in self.biases:
            nn.init.zeros_(bias)

    @property
    def weights(self) -> list[nn.Parameter]:
        """Weight matrices, input layer first."""
        return [parameter for parameter in self.parameters() if parameter.dim() == 2]

    @property
    def biases(self) -> list[nn.Parameter]:
        """Biases, input layer first."""
        return [parameter for parameter in self.parameters() if parameter.dim() == 1]

    def forward(self, x: Tensor) -> Tensor:
        """Pre-activations of the output layer, [samples, classes], of inputs [samples, pixels]."""
        for number, layer in enumerate(self.layers):
            z: Tensor = layer(x)
            # Dropout without rescaling while training; later layers are scaled at test time.
            if number and not self.training:
                z = z * (1 - self.dropout)
            if number == len(self.layers) - 1:
                return z
            x = F.relu(z)
            if self.training:
                gone = torch.rand_like(x) < self.dropout
                # The authors' backward pass does not see the dropout mask (straight-through).
                x = x - (x * gone).detach()
        raise AssertionError("a network has at least one layer")


def tutorial_loss(z: Tensor, labels: Tensor) -> Tensor:
    """A scalar whose gradient is the authors' output error, averaged over the batch.

    Their error is (a - y) s(a) (1 - s(a)) with a = s(z) and s the sigmoid: the derivative is taken
    at the activation, not at z, so it is not the gradient of a squared error.
    """
    a = torch.sigmoid(z.detach())
    again = torch.sigmoid(a)
    error = (a - F.one_hot(labels, z.shape[1])) * again * (1 - again)
    return (z * error).sum() / len(z)


def tutorial_data(settings: Settings) -> Dataset:
    """The authors' 2,000 training and 1,000 test images, pixels in [0, 1], flattened."""
    data = load("fashion_mnist", normalise=False)
    random = np.random.RandomState(0)
    train, test = np.arange(len(data.train_x)), np.arange(len(data.test_x))
    random.shuffle(train)
    random.shuffle(test)
    chosen = torch.from_numpy(train[: settings.train_samples])
    chosen_test = torch.from_numpy(test[: settings.test_samples])
    return replace(
        data,
        train_x=data.train_x[chosen].flatten(1),
        train_y=data.train_y[chosen],
        test_x=data.test_x[chosen_test].flatten(1),
        test_y=data.test_y[chosen_test],
    )


def densities(settings: Settings) -> dict[str, float]:
    """Expected density of each layer after the authors' draws, which are with replacement."""
    result = {}
    for number, (fan_in, fan_out) in enumerate(pairwise(settings.widths)):
        weights, draws = fan_in * fan_out, settings.epsilon * (fan_in + fan_out)
        result[f"layers.{number}.weight"] = -math.expm1(draws * math.log1p(-1 / weights))
    return result


def policy(method: str, settings: Settings) -> st.Policy | None:
    """The mask policy of a method; None for dense training."""
    allocation = st.Explicit(densities=densities(settings))
    if method == "static":
        return st.Static(allocation=allocation)
    if method == "set":
        total = settings.total_steps
        return st.SET(
            allocation=allocation,
            total_steps=total,
            drop_fraction=settings.zeta,
            drop="magnitude_by_sign",
            grow_std=settings.weight_std,
            # No update of its own: the authors evaluate between the last step of an epoch and the
            # change of masks, so `train` calls `update_masks` after the evaluation.
            update=st.UpdateSchedule(every=settings.steps_per_epoch, start=total, stop=total),
        )
    return None


def build(method: str, seed: int, settings: Settings) -> tuple[TutorialMLP, torch.optim.Optimizer]:
    """The network and its optimizer, as the seed makes them."""
    torch.manual_seed(seed)
    model = TutorialMLP(settings)
    weights, biases = model.weights, model.biases
    dense = method == "dense"
    optimizer: torch.optim.Optimizer = torch.optim.SGD(
        [
            {"params": weights, "lr": settings.dense_weight_lr if dense else settings.sparse_lr},
            {"params": biases, "lr": settings.dense_bias_lr if dense else settings.sparse_lr},
        ],
        momentum=settings.momentum,
    )
    parameters: list[Tensor] = [*weights, *biases]

    def decay(*_: Any) -> None:
        with torch.no_grad():
            torch._foreach_mul_(parameters, 1 - settings.decay)

    chosen = policy(method, settings)
    if chosen is not None:
        optimizer = st.SparseOptimizer(optimizer, model, chosen, seed=seed)
    # Weight decay of the authors: on weights and biases, not multiplied by the learning rate.
    optimizer.register_step_pre_hook(decay)
    return model, optimizer


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of samples whose largest output is at their label."""
    model.eval()
    right = int((model(x).argmax(dim=1) == y).sum())
    model.train()
    return right / len(y)


def train(job: common.Record, report: common.Report) -> common.Record:
    """One run, resumed from its checkpoint where there is one."""
    settings = Settings(**job["settings"])
    key, method = job["key"], job["method"]
    model, optimizer = build(method, job["seed"], settings)
    data = tutorial_data(settings)
    checkpoint = HERE / "checkpoints" / f"{key}-{settings.epochs}.pt"
    test_curve: list[float] = []
    train_curve: dict[str, float] = {}
    seconds = _resume(checkpoint, model, optimizer, test_curve, train_curve)
    model.train()
    for epoch in range(len(test_curve) + 1, settings.epochs + 1):
        started = time.perf_counter()
        _train_epoch(model, optimizer, data, settings)
        seconds += time.perf_counter() - started
        test_curve.append(accuracy(model, data.test_x, data.test_y))
        last = epoch == settings.epochs
        if epoch % TRAIN_ACCURACY_EVERY == 0 or last:
            train_curve[str(epoch)] = accuracy(model, data.train_x, data.train_y)
        if method == "set" and not last:
            started = time.perf_counter()
            assert isinstance(optimizer, st.SparseOptimizer)
            optimizer.update_masks()
            seconds += time.perf_counter() - started
        if epoch % TRAIN_ACCURACY_EVERY == 0 and not last:
            _save(checkpoint, model, optimizer, test_curve, train_curve, seconds)
        report(key, epoch, settings.epochs, f"test {100 * test_curve[-1]:.1f} %")
    checkpoint.unlink(missing_ok=True)
    active = None
    if isinstance(optimizer, st.SparseOptimizer):
        active = {name: target.active for name, target in optimizer.targets.items()}
    return {
        "method": method,
        "seed": job["seed"],
        "last": test_curve[-1],
        "best": max(test_curve),
        "train_last": train_curve[str(settings.epochs)],
        "train_seconds": round(seconds, 2),
        "active": active,
        "test_curve": test_curve,
        "train_curve": train_curve,
    }


def _train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Dataset, settings: Settings
) -> None:
    order = torch.randperm(len(data.train_x))
    size = settings.batch_size
    for step in range(settings.steps_per_epoch):
        index = order[step * size : (step + 1) * size]
        loss = tutorial_loss(model(data.train_x[index]), data.train_y[index])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def _save(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    test_curve: list[float],
    train_curve: dict[str, float],
    seconds: float,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "test_curve": test_curve,
        "train_curve": train_curve,
        "seconds": seconds,
    }
    with whole_file(path) as partial:
        torch.save(state, partial)


def _resume(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    test_curve: list[float],
    train_curve: dict[str, float],
) -> float:
    """Take over a checkpoint and return the training seconds so far; 0 when there is none."""
    if not path.exists():
        return 0.0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])
    test_curve += state["test_curve"]
    train_curve |= state["train_curve"]
    return float(state["seconds"])


def summarise(runs: list[common.Record]) -> list[common.Record]:
    """Published against ours, one row a method, accuracies in percent."""
    rows = []
    for method in METHODS:
        mine = [run for run in runs if run["method"] == method]
        if not mine:
            continue
        last = [100 * run["last"] for run in mine]
        published, sd = common.mean(PUBLISHED_LAST[method]), common.spread(PUBLISHED_LAST[method])
        rows.append(
            {
                "method": method,
                "seeds": len(mine),
                "published_mean": round(published, 2),
                "published_sd": round(sd, 2),
                "mean": round(common.mean(last), 2),
                "sd": round(common.spread(last), 2),
                "difference_in_published_sd": round((common.mean(last) - published) / sd, 2),
                "published_best": PUBLISHED_BEST[method],
                "best": round(100 * common.mean([run["best"] for run in mine]), 2),
                "published_train": PUBLISHED_TRAIN[method],
                "train": round(100 * common.mean([run["train_last"] for run in mine]), 2),
                "seconds_a_run": round(common.mean([run["train_seconds"] for run in mine]), 1),
            }
        )
    return rows


def table(rows: list[common.Record]) -> str:
    """The same as Markdown."""
    header = ["", "published", "ours", "difference", "best epoch", "train accuracy", "s a run"]
    return common.markdown_table(
        header,
        [
            (
                {"dense": "dense", "set": "SET", "static": "fixed random"}[row["method"]],
                f"{row['published_mean']:.2f} ± {row['published_sd']:.2f}",
                f"**{row['mean']:.2f} ± {row['sd']:.2f}**",
                f"{row['difference_in_published_sd']:+.1f} sd",
                f"{row['published_best']:.2f} / {row['best']:.2f}",
                f"{row['published_train']:.1f} / {row['train']:.1f}",
                f"{row['seconds_a_run']:.0f}",
            )
            for row in rows
        ],
    )


def main() -> None:
    """Run what is missing, then write results.json and the table in the README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=400, help="fewer make a trial run")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the results")
    arguments = parser.parse_args()
    settings = Settings(epochs=arguments.epochs)
    tutorial_data(settings)  # a missing data set is told once, here
    jobs = [
        {
            "key": f"{method}-{seed}",
            "method": method,
            "seed": seed,
            "settings": asdict(settings),
        }
        for seed in range(arguments.seeds)
        for method in arguments.methods
    ]
    log = common.ResultLog(arguments.out / f"results-{settings.epochs}.jsonl")
    runs = common.run_jobs(jobs, train, log, workers=arguments.workers)
    rows = summarise(runs)
    result = {
        "experiment": "SET tutorial (IJCAI 2019), Fashion-MNIST, 2,000 / 1,000 images",
        "settings": {**asdict(settings), "densities": densities(settings)},
        "machine": {**common.machine(), "threads": "1 a run", "workers": arguments.workers},
        "table": rows,
        "runs": runs,
    }
    common.write_json(arguments.out / "results.json", result)
    common.console.print(table(rows))
    if arguments.out == HERE and settings.epochs == 400:
        common.put_into(HERE / "README.md", table(rows))


if __name__ == "__main__":
    main()
