"""How long one layer takes in training, held densely and held sparse, on this machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparsetrain.storage.csr.convert import sparsify
from sparsetrain.timing import median_seconds

_ROUNDS = 7
_SECONDS = 0.003  # of a round, at least


class Timing(NamedTuple):
    """Milliseconds of a layer's forward and backward pass and one pass over its weights."""

    dense: float
    sparse: float


def measure(layer: nn.Module, density: float, input_shape: tuple[int, ...]) -> Timing:
    """Time a copy of a Linear or Conv2d layer, dense and with random non-zeros, in turn.

    Args:
        density: of the sparse copy.
        input_shape: of the layer's input, batch included.
    """
    with torch.random.fork_rng(devices=[]):
        dense, sparse = _like(layer), _like(layer)
        weight = dense._parameters["weight"]
        assert weight is not None
        mask = torch.rand(weight.shape) < density
        mask.view(-1)[0] = True
        x = torch.randn(input_shape, dtype=weight.dtype, requires_grad=True)
    jobs = [_training_step(dense, x), _training_step(sparsify(sparse, mask), x)]
    times = median_seconds(jobs, rounds=_ROUNDS, seconds=_SECONDS)
    return Timing(*(1e3 * seconds for seconds in times))


def _training_step(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    parameters = list(layer.parameters())
    with torch.enable_grad():
        grad = torch.ones_like(layer(x))

    def step() -> None:
        with torch.enable_grad():
            grads = torch.autograd.grad(layer(x), [x, *parameters], grad)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, grads[1:], strict=True):
                parameter.add_(gradient, alpha=-1e-9)

    return step


def _like(layer: nn.Module) -> nn.Module:
    """A new dense layer of the same shape."""
    bias, weight = layer.bias is not None, layer._parameters["weight"]
    assert weight is not None
    if isinstance(layer, nn.Conv2d):
        return nn.Conv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,  # type: ignore[arg-type]
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
            layer.dilation,  # type: ignore[arg-type]
            bias=bias,
            dtype=weight.dtype,
        )
    assert isinstance(layer, nn.Linear)
    return nn.Linear(layer.in_features, layer.out_features, bias, dtype=weight.dtype)
