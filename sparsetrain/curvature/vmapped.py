"""Per-sample gradients of any model, by torch.func."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils import _pytree as pytree

from sparsetrain.batches import Batch
from sparsetrain.curvature.losses import LossFunction

Gradients = dict[str, Tensor]


def chunk_size(parameters: Mapping[str, Tensor], budget: int) -> int:
    """Samples whose gradients together take `budget` numbers; at least one."""
    return max(budget // max(sum(p.numel() for p in parameters.values()), 1), 1)


def gradients_of(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    batch: Batch,
    loss_fn: LossFunction,
    budget: int,
) -> Iterator[Gradients]:
    """Gradients of each sample's own loss, a chunk of samples at a time.

    Args:
        model: in evaluation mode.
        parameters: name -> parameter to have the gradient of; the others stay constants.
        budget: numbers that the gradients of a chunk may take.

    Yields:
        Name -> [samples of the chunk, *shape].

    Raises:
        RuntimeError: the model cannot be vectorised; the message says why.
    """
    own = {name: parameter.detach() for name, parameter in parameters.items()}
    of_one = _gradient_of_one(model, loss_fn)
    for part in batch.parts(chunk_size(own, budget)):
        samples = (part.args, part.kwargs, part.targets)
        axes = pytree.tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, samples)
        try:
            with torch.no_grad():  # the other parameters may want gradients, outside of `grad`
                found = vmap(of_one, (None, *axes), randomness="error")(own, *samples)
        except RuntimeError as error:
            raise RuntimeError(_explained(error)) from error
        yield found


def _gradient_of_one(model: nn.Module, loss_fn: LossFunction) -> Callable[..., Any]:
    def loss(own: Gradients, args: Any, kwargs: Any, target: Any) -> Tensor:
        args, kwargs, target = pytree.tree_map(_as_batch, (args, kwargs, target))
        return loss_fn(functional_call(model, own, args, kwargs), target)

    return grad(loss)


def _as_batch(leaf: Any) -> Any:
    return leaf.unsqueeze(0) if isinstance(leaf, Tensor) else leaf


def _explained(error: RuntimeError) -> str:
    text = str(error)
    if "randomness" in text:
        return (
            "the model draws random numbers in evaluation mode (a functional dropout without "
            "training=self.training, perhaps), so that its curvature is not defined"
        )
    return f"torch.func cannot vectorise this model over samples, use method='loop': {text}"


def looped_gradients(
    model: nn.Module, parameters: Mapping[str, Tensor], batch: Batch, loss_fn: LossFunction
) -> Iterator[Gradients]:
    """As `gradients_of`, one sample after the other with plain autograd.

    Args:
        parameters: those of the model, which want gradients.
    """
    names, tensors = list(parameters), list(parameters.values())
    for part in batch.parts(1):
        loss = loss_fn(part.forward(model), part.targets)
        found = torch.autograd.grad(loss, tensors, allow_unused=True)
        yield {
            name: (torch.zeros_like(tensor) if gradient is None else gradient).unsqueeze(0)
            for name, tensor, gradient in zip(names, tensors, found, strict=True)
        }
