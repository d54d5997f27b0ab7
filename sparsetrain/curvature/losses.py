"""The loss of each sample by itself, whatever the loss function does over a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F
from torch.utils import _pytree as pytree

#: (outputs of the model, targets) of a batch -> a scalar.
LossFunction = Callable[[Any, Any], Tensor]


def sample_losses(loss_fn: LossFunction, outputs: Any, targets: Any, size: int) -> Tensor:
    """The loss of a batch of one, for each sample.

    So it does not matter whether `loss_fn` takes a mean or a sum over the batch.

    Args:
        outputs: of the model, samples along dimension 0.
        size: number of samples.

    Returns:
        [size]

    Raises:
        ValueError: the loss is no scalar, or NaN or infinite.
    """
    if isinstance(outputs, Tensor) and isinstance(targets, Tensor):
        losses = _of_classes(loss_fn, outputs, targets)
        if losses is None:
            losses = _vectorised(loss_fn, outputs, targets)
    else:
        losses = _one_by_one(loss_fn, outputs, targets, size)
    if losses.shape != (size,):
        raise ValueError(
            "loss_fn must return one number for a batch of one sample; for a batch of "
            f"{size} single samples it gave values of shape {tuple(losses.shape)}"
        )
    bad = (~losses.detach().isfinite()).nonzero()
    if len(bad):
        first = int(bad[0])
        raise ValueError(
            f"the loss of sample {first} of a batch of {size} is {losses[first].item()}: look for "
            "bad inputs, or a model that has diverged"
        )
    return losses


def _of_classes(loss_fn: LossFunction, outputs: Tensor, targets: Tensor) -> Tensor | None:
    """Plain cross-entropy without vmap, which takes longer and loads much for it at first."""
    if type(loss_fn) is nn.CrossEntropyLoss:
        is_plain = loss_fn.weight is None and not loss_fn.label_smoothing
        ignored, reduction = loss_fn.ignore_index, loss_fn.reduction
    else:
        is_plain, ignored, reduction = loss_fn is F.cross_entropy, -100, "mean"
    has_classes = outputs.dim() > 1 and targets.dtype == torch.int64
    if not (is_plain and has_classes and reduction in ("mean", "sum")):
        return None
    if outputs.shape[:1] + outputs.shape[2:] != targets.shape or (targets == ignored).any():
        return None
    losses = F.cross_entropy(outputs, targets, reduction="none").reshape(len(outputs), -1)
    return losses.sum(1) if reduction == "sum" else losses.mean(1)


def _vectorised(loss_fn: LossFunction, outputs: Tensor, targets: Tensor) -> Tensor:
    def of_one(output: Tensor, target: Tensor) -> Tensor:
        return loss_fn(output.unsqueeze(0), target.unsqueeze(0))

    try:
        losses: Tensor = vmap(of_one, randomness="different")(outputs, targets)
    except RuntimeError:  # branches on values, for instance; what is really wrong fails here again
        return _one_by_one(loss_fn, outputs, targets, len(outputs))
    return losses


def _one_by_one(loss_fn: LossFunction, outputs: Any, targets: Any, size: int) -> Tensor:
    return torch.stack(
        [loss_fn(_sample(outputs, i, size), _sample(targets, i, size)) for i in range(size)]
    )


def _sample(values: Any, index: int, size: int) -> Any:
    def cut(leaf: Any) -> Any:
        has_samples = isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == size
        return leaf[index : index + 1] if has_samples else leaf

    return pytree.tree_map(cut, values)


def sampled_labels(outputs: Any, generator: torch.Generator) -> Tensor:
    """Labels drawn from the softmax of logits.

    Args:
        outputs: [samples, classes, ...].
        generator: CPU random source.

    Returns:
        int64 [samples, ...]

    Raises:
        ValueError: outputs are no logits.
    """
    if not isinstance(outputs, Tensor) or outputs.dim() < 2:
        raise ValueError(
            "labels can be drawn from a tensor of logits [samples, classes, ...] alone; let the "
            "model return that"
        )
    # The largest of logits + Gumbel noise is a draw from their softmax.
    uniform = torch.rand(outputs.shape, generator=generator).to(outputs.device)
    noise = -(-uniform.clamp_min(1e-30).log()).log()
    return (outputs.detach() + noise).argmax(1)
