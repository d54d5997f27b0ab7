"""Feed the recipe the authors' random numbers and compare with the accuracies in their files.

    python -m reference_runs.set_fashion_mnist.check_recipe

NumPy's legacy generator is the same everywhere, so initial weights, masks, batch order and dropout
of a published run can be drawn again. In float64 the recipe of `run.py`, with this library holding
the masks, must then give the published accuracies of the first epochs to the last digit, which
settles data, loss, dropout, momentum and decay at once. (SET's own random regrowth is drawn from
another generator here, so only its first epoch, before any update, can be compared.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

import sparsetrain as st
from reference_runs import _common as common
from reference_runs.set_fashion_mnist.run import (
    Settings,
    TutorialMLP,
    accuracy,
    build,
    tutorial_data,
    tutorial_loss,
)
from sparsetrain.workbench import Dataset

#: (training, test) accuracy after the first epochs, by method and seed, from Pretrained_results.
PUBLISHED = {
    ("static", 0): [(0.2730, 0.227), (0.2130, 0.204), (0.2755, 0.266), (0.4895, 0.484)],
    ("static", 1): [(0.2840, 0.268), (0.3350, 0.333), (0.4620, 0.456)],
    ("dense", 0): [(0.6485, 0.640), (0.7010, 0.670), (0.7930, 0.750)],
    ("set", 1): [(0.2840, 0.268)],
}


def main() -> None:
    """Print both columns and fail when they differ."""
    settings = Settings()
    data = _in_double(tutorial_data(settings))
    wrong = 0
    for (method, seed), published in PUBLISHED.items():
        for epoch, (ours, theirs) in enumerate(
            zip(_replay(method, seed, settings, data), published, strict=False), start=1
        ):
            same = all(math.isclose(a, b, abs_tol=1e-9) for a, b in zip(ours, theirs, strict=True))
            wrong += not same
            common.console.print(
                f"{method} seed {seed} epoch {epoch}: train, test {ours}, published {theirs}"
                f"{'' if same else '  DIFFERENT'}"
            )
    if wrong:
        raise SystemExit(f"{wrong} epochs differ from the published files")


def _in_double(data: Dataset) -> Dataset:
    """Pixels as float64 quotients of 255, without the rounding to float32."""
    train, test = ((255 * x.double()).round() / 255 for x in (data.train_x, data.test_x))
    return replace(data, train_x=train, test_x=test)


def _replay(
    method: str, seed: int, settings: Settings, data: Dataset
) -> Iterator[tuple[float, float]]:
    """Accuracies after each epoch of a run that draws what the authors' run drew."""
    random = np.random.RandomState(seed)
    weights = [
        _dense(random, i, o) if method == "dense" else _sparse(random, i, o, settings.epsilon)
        for i, o in pairwise(settings.widths)
    ]
    model, optimizer = build(method, seed, settings)
    _install(model, optimizer, weights)
    for _ in range(settings.epochs):
        order = np.arange(settings.train_samples)
        random.shuffle(order)
        with _drawing(lambda x: torch.from_numpy(random.random_sample(tuple(x.shape)))):
            for batch in torch.split(torch.from_numpy(order), settings.batch_size):
                loss = tutorial_loss(model(data.train_x[batch]), data.train_y[batch])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        yield (
            accuracy(model, data.train_x, data.train_y),
            accuracy(model, data.test_x, data.test_y),
        )


def _dense(random: np.random.RandomState, fan_in: int, fan_out: int) -> Tensor:
    return torch.from_numpy(random.randn(fan_in, fan_out) / 10).T.contiguous()


def _sparse(random: np.random.RandomState, fan_in: int, fan_out: int, epsilon: int) -> Tensor:
    weight = np.zeros((fan_in, fan_out))
    for _ in range(epsilon * (fan_in + fan_out)):
        value = random.randn() / 10
        weight[random.randint(0, fan_in), random.randint(0, fan_out)] = value
    return torch.from_numpy(weight).T.contiguous()


@torch.no_grad()
def _install(model: TutorialMLP, optimizer: torch.optim.Optimizer, weights: list[Tensor]) -> None:
    model.double()
    if isinstance(optimizer, st.SparseOptimizer):
        for target, weight in zip(optimizer.targets.values(), weights, strict=True):
            target.replace_mask(weight != 0)
    for parameter, weight in zip(model.weights, weights, strict=True):
        parameter.copy_(weight)


@contextmanager
def _drawing(draw: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let `torch.rand_like`, which the dropout calls, hand out other numbers."""
    original = torch.rand_like
    torch.rand_like = draw  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.rand_like = original


if __name__ == "__main__":
    main()
