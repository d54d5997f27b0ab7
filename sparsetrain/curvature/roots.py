"""Square roots of a loss's Hessian with respect to the model's outputs, column by column.

H = S S' for each sample by itself. A generalized Gauss-Newton matrix is then (J' S)(J' S)', J being
the Jacobian of the outputs, so that its diagonal is a sum of squared gradients: of (outputs * s)
for each column s, or for one random mixture of the columns on average.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, jacrev, vmap
from torch.nn import functional as F

from sparsetrain.curvature.losses import LossFunction

#: Outputs of a sample beyond which a Hessian of them is too large.
_MOST_OUTPUTS = 1024


def columns(loss_fn: LossFunction, outputs: Tensor, targets: Any) -> Iterator[Tensor]:
    """Every column of S, each of the outputs' shape.

    Raises:
        ValueError: the loss is not convex in the outputs, or they are too many.
    """
    if not isinstance(outputs, Tensor):
        raise ValueError(f"the GGN needs a model that returns a tensor, not {type(outputs)}")
    outputs = outputs.detach()
    if _is_cross_entropy(loss_fn) and outputs.dim() == 2:
        root, share = _softmax_root(loss_fn, outputs, targets)
        for c in range(outputs.shape[1]):
            column = -root[:, c : c + 1] * share
            column[:, c] += root[:, c]
            yield column
        return
    roots = _roots(loss_fn, outputs, targets)
    for c in reversed(range(roots.shape[2])):
        column = roots[:, :, c]
        if column.any():
            yield column.reshape(outputs.shape)


def mixture(
    loss_fn: LossFunction, outputs: Tensor, targets: Any, generator: torch.Generator
) -> Tensor:
    """S times random signs, of the outputs' shape.

    Raises:
        ValueError: as `columns`.
    """
    if not isinstance(outputs, Tensor):
        raise ValueError(f"the GGN needs a model that returns a tensor, not {type(outputs)}")
    outputs = outputs.detach()
    signs = torch.randint(0, 2, outputs.shape, generator=generator).to(outputs) * 2 - 1
    if _is_cross_entropy(loss_fn):
        root, share = _softmax_root(loss_fn, outputs, targets)
        mixed = root * signs
        return mixed - share * mixed.sum(1, keepdim=True)
    roots = _roots(loss_fn, outputs, targets)
    return (roots @ signs.reshape(len(outputs), -1, 1)).reshape(outputs.shape)


def _is_cross_entropy(loss_fn: LossFunction) -> bool:
    if isinstance(loss_fn, nn.CrossEntropyLoss):
        return loss_fn.weight is None or not loss_fn.label_smoothing
    return loss_fn is F.cross_entropy


def _softmax_root(loss_fn: Any, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(weight * p) and p: the columns of S are sqrt(weight * p_c) (e_c - p).

    The weight is what the loss gives to each position of a sample.
    """
    share = logits.softmax(1)
    weight = _weights_of_positions(loss_fn, targets, share).unsqueeze(1)
    return (share * weight).sqrt(), share


def _weights_of_positions(loss_fn: Any, targets: Tensor, share: Tensor) -> Tensor:
    """[samples, ...]: each position's factor in the loss of its sample."""
    is_module = isinstance(loss_fn, nn.CrossEntropyLoss)
    of_class = loss_fn.weight if is_module else None
    weight = torch.ones_like(share.select(1, 0))
    total = weight
    if targets.is_floating_point():  # probabilities of classes; the mean is over positions
        if of_class is not None:
            shape = [-1, *[1] * (share.dim() - 2)]
            weight = (targets * of_class.reshape(shape)).sum(1)
    else:
        ignored = targets == (loss_fn.ignore_index if is_module else -100)
        if of_class is not None:
            weight = of_class[targets.masked_fill(ignored, 0)]
        total = weight = weight.masked_fill(ignored, 0.0)
    if is_module and loss_fn.reduction == "sum":
        return weight
    sums = total.reshape(len(total), -1).sum(1).clamp_min(1e-30)
    return weight / sums.reshape(-1, *[1] * (weight.dim() - 1))


def _roots(loss_fn: LossFunction, outputs: Tensor, targets: Any) -> Tensor:
    """[samples, outputs, columns] for any loss, by its Hessian's eigenvectors."""
    samples, size = len(outputs), outputs[0].numel()
    if size > _MOST_OUTPUTS:
        raise ValueError(
            f"a sample has {size} outputs, too many for the Hessian of a loss that is not known to "
            "be cross-entropy: give torch.nn.CrossEntropyLoss() itself, or fewer outputs"
        )

    def of_one(output: Tensor, target: Tensor) -> Tensor:
        return loss_fn(output.reshape(1, *outputs.shape[1:]), target.unsqueeze(0))

    curved, flat = jacrev(grad(of_one)), outputs.reshape(samples, size)
    try:
        curvature = vmap(curved)(flat, targets)
    except RuntimeError:  # branches on values, for instance; what is really wrong fails here again
        curvature = torch.stack([curved(o, t) for o, t in zip(flat, targets, strict=True)])
    values, vectors = torch.linalg.eigh(curvature)
    largest = values.abs().amax(1, keepdim=True)
    noise = size * torch.finfo(values.dtype).eps * largest
    if (values < -noise).any():
        raise ValueError(
            "the loss is not convex in the model's outputs, so that it has no generalized "
            "Gauss-Newton matrix"
        )
    values = torch.where(values > noise, values, 0.0)
    root: Tensor = vectors * values.sqrt().unsqueeze(1)
    return root
