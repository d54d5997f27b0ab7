"""Per-sample gradients and the diagonal of the Fisher matrix."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparsetrain.batches import Adapter, read
from sparsetrain.candidates import unwrapped
from sparsetrain.curvature import vmapped
from sparsetrain.curvature.diagonals import (
    BUDGET,
    Diagonal,
    Method,
    Pass,
    chosen_parameters,
    mean_squares,
)
from sparsetrain.curvature.losses import LossFunction, sampled_labels
from sparsetrain.evaluating import evaluating, wanting

Labels = Literal["data", "model"]


def iterate_per_sample_gradients(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction,
    *,
    parameters: Iterable[str] | None = None,
    method: Literal["vmap", "loop"] = "vmap",
    adapter: Adapter | None = None,
    budget: int = BUDGET,
    progress: bool = False,
) -> Iterator[dict[str, Tensor]]:
    """As `per_sample_gradients`, some samples at a time, in order."""
    model = unwrapped(model)
    chosen = chosen_parameters(model, parameters)
    who = "per_sample_gradients"
    with evaluating(model), wanting(model, chosen.values()):
        for batch in read(batches, model, who=who, adapter=adapter, progress=progress):
            if method == "loop":
                yield from vmapped.looped_gradients(model, chosen, batch, loss_fn)
            else:
                yield from vmapped.gradients_of(model, chosen, batch, loss_fn, budget)


def per_sample_gradients(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction,
    *,
    parameters: Iterable[str] | None = None,
    method: Literal["vmap", "loop"] = "vmap",
    adapter: Adapter | None = None,
    budget: int = BUDGET,
    progress: bool = False,
) -> dict[str, Tensor]:
    """The gradient of each sample's own loss.

    The model is in evaluation mode meanwhile; `.grad` and everything else stay as they are.

    Args:
        batches: an iterable of (inputs, targets), or of what `adapter` makes that of.
        loss_fn: (outputs, targets) -> scalar; it is called for one sample at a time.
        parameters: names; all that train when None.
        method: "vmap" vectorises over samples with torch.func, "loop" takes one after the other.
        budget: numbers that are computed at a time. The result is as large as it is, samples
            times parameters; `iterate_per_sample_gradients` gives it in pieces.
        progress: whether to show a bar.

    Returns:
        Parameter name -> [samples, *shape], samples in the order of the batches.

    Raises:
        ValueError: no batch, unknown names, a loss that is no scalar.
        RuntimeError: torch.func cannot vectorise the model.
    """
    chunks = iterate_per_sample_gradients(
        model,
        batches,
        loss_fn,
        parameters=parameters,
        method=method,
        adapter=adapter,
        budget=budget,
        progress=progress,
    )
    found: dict[str, list[Tensor]] = {}
    for chunk in chunks:
        for name, gradient in chunk.items():
            found.setdefault(name, []).append(gradient)
    return {name: torch.cat(parts) for name, parts in found.items()}


def fisher_diagonal(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction,
    *,
    labels: Labels = "data",
    parameters: Iterable[str] | None = None,
    method: Method = "auto",
    adapter: Adapter | None = None,
    seed: int = 0,
    budget: int = BUDGET,
    progress: bool = False,
) -> Diagonal:
    """The mean over samples of the squared gradient of the sample's own loss.

    With the labels of the data this is the empirical Fisher matrix's diagonal, with labels drawn
    from the model's own softmax an estimate of the Fisher matrix's (Kunstner et al. 2019,
    "Limitations of the empirical Fisher approximation", section 2). The model is in evaluation mode
    meanwhile; `.grad` and everything else stay as they are.

    Args:
        batches: an iterable of (inputs, targets), or of what `adapter` makes that of.
        loss_fn: (outputs, targets) -> scalar; it is called for one sample at a time.
        labels: "data", or "model" for a classifier whose outputs are logits [samples, classes,
            ...] and whose loss is a negative log-likelihood of integer labels.
        parameters: names; all that train when None.
        method: "auto" takes short ways through layers where they give what autograd gives, and
            vmap elsewhere; "vmap" and "loop" are for all parameters.
        seed: of the labels.
        budget: numbers that per-sample gradients may take at a time.
        progress: whether to show a bar.

    Returns:
        Parameter name -> tensor of the parameter's shape.

    Raises:
        ValueError: no batch, unknown names, a loss that is no finite scalar.
        RuntimeError: torch.func cannot vectorise the model where it has to.
    """
    generator = torch.Generator().manual_seed(seed)

    def passes(outputs: Any, targets: Any) -> Iterator[Pass]:
        if labels == "model":
            targets = sampled_labels(outputs, generator)
        yield Pass(loss_fn, targets)

    means, samples = mean_squares(
        model,
        batches,
        passes,
        who="fisher_diagonal",
        parameters=parameters,
        method=method,
        adapter=adapter,
        budget=budget,
        progress=progress,
    )
    name = "empirical Fisher" if labels == "data" else "Fisher, labels drawn from the model"
    return Diagonal(means, name, samples)
