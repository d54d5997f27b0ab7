"""Per-sample gradients of a layer's parameters from what went in and what came back.

For each kind of layer: a function of (module, input, gradient of the output), which gives the
gradients of `weight` and `bias` for every sample, and, where there is a shorter way, their sum of
squares over the samples. Samples are along dimension 0 of both tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrain.convolution import CONVOLUTIONS, padded_input, patches

#: Leaf name, "weight" or "bias" -> tensor.
Gradients = dict[str, Tensor]
PerSample = Callable[[Any, Tensor, Tensor], Gradients]
#: Numbers that stay in the cache between being computed, squared and added up.
_CACHED = 1 << 19


def is_known(module: nn.Module) -> bool:
    """Whether the layer's gradients can be had from its input and the gradient of its output."""
    has_hooks = bool(module._forward_hooks or module._forward_pre_hooks)
    return _rule(module) is not None and not has_hooks


def per_sample(module: nn.Module, given: Tensor, back: Tensor) -> Gradients:
    """Gradients of each sample, [samples, *shape of the parameter].

    Args:
        given: input of the layer.
        back: gradient of each sample's own loss on the layer's output.
    """
    rule = _rule(module)
    assert rule is not None
    gradients = rule(module, given, back)
    return {leaf: value for leaf, value in gradients.items() if _has(module, leaf)}


def numbers_of_a_sample(module: Any, back: Tensor) -> int:
    """How many the gradients of a sample are, or what has to be made on the way to them."""
    numel: int = sum(parameter.numel() for parameter in module.parameters(recurse=False))
    if _takes_patches(module):
        numel = max(numel, module.weight[0].numel() * back[0, 0].numel())
    return max(numel, 1)


def has_outer_products(module: nn.Module, given: Tensor) -> bool:
    """Whether the gradient of a sample is an outer product, and so is its square."""
    return isinstance(module, nn.Linear) and given.dim() == 2


def sums_of_outer_squares(
    module: nn.Module, given: Tensor, squares: Tensor, before: Tensor | None
) -> Gradients:
    """As `sums_of_squares`, for a layer that has outer products.

    Args:
        squares: those of the gradient on the layer's output. Squares of several passes with the
            same input may be added up before.
        before: the weight's sum so far, to which its own is added in place.
    """
    factors = squares.T, given.square()
    weight = torch.mm(*factors) if before is None else before.addmm_(*factors)
    sums = {"weight": weight, "bias": squares.sum(0)}
    return {leaf: value for leaf, value in sums.items() if _has(module, leaf)}


def sums_of_squares(module: nn.Module, given: Tensor, back: Tensor, budget: int) -> Gradients:
    """Squares of the per-sample gradients, summed over the samples.

    Args:
        budget: numbers that the per-sample gradients may take at a time.
    """
    if isinstance(module, nn.Embedding):
        return {"weight": _embedding_squares(module, given, back)}
    numbers = len(given) * numbers_of_a_sample(module, back)
    count = max(math.ceil(numbers / budget), round(numbers / _CACHED), 1)
    size = math.ceil(len(given) / count)
    parts = list(zip(torch.split(given, size), torch.split(back, size), strict=True))
    if _has_products(module, given):
        return _sums_of_squared_products(module, parts)
    sums: Gradients = {}
    for part in parts:
        for leaf, gradient in per_sample(module, *part).items():
            square = gradient.square_().sum(0)
            sums[leaf] = sums[leaf].add_(square) if leaf in sums else square
    return sums


def _has(module: nn.Module, leaf: str) -> bool:
    return getattr(module, leaf, None) is not None


def _rule(module: nn.Module) -> PerSample | None:
    for kind, rule in _RULES.items():
        if isinstance(module, kind):
            # A subclass may compute something else.
            return rule if type(module).forward is kind.forward else None
    return None


# Layers whose weight has a matrix product for the gradient of a sample.


def _has_products(module: nn.Module, given: Tensor) -> bool:
    return _takes_patches(module) or (isinstance(module, nn.Linear) and given.dim() > 2)


def _takes_patches(module: Any) -> bool:
    """Whether a convolution is computed as the Linear layer of its patches."""
    # oneDNN has fast grouped kernels for multiples of 8 channels; a network's first layer has 3.
    is_convolution = isinstance(module, CONVOLUTIONS)
    return is_convolution and module.groups == 1 and module.in_channels % 8 != 0


def _factors(module: Any, given: Tensor, back: Tensor) -> tuple[Tensor, Tensor]:
    """[samples, outputs, places] and [samples, places, inputs]."""
    if isinstance(module, nn.Linear):
        return back.flatten(1, -2).transpose(1, 2), given.flatten(1, -2)
    columns = patches(module, given, back.shape[2:]).reshape(
        len(given), module.weight[0].numel(), -1
    )
    return back.flatten(2), columns.transpose(1, 2)


def _of_products(module: Any, given: Tensor, back: Tensor) -> Gradients:
    rows, columns = _factors(module, given, back)
    weight = torch.bmm(rows, columns).reshape(-1, *module.weight.shape)
    return {"weight": weight, "bias": rows.sum(2)}


def _sums_of_squared_products(module: Any, parts: Sequence[tuple[Tensor, Tensor]]) -> Gradients:
    """As `sums_of_squares`, with one piece of memory for the products of all parts."""
    given, back = parts[0]
    memory = back.new_empty(len(given), len(module.weight), module.weight[0].numel())
    weight, bias = torch.zeros_like(memory[0]), back.new_zeros(len(module.weight))
    for given, back in parts:
        rows, columns = _factors(module, given, back)
        products = torch.bmm(rows, columns, out=memory[: len(rows)])
        weight += products.square_().sum(0)
        bias += rows.sum(2).square_().sum(0)
    sums = {"weight": weight.view_as(module.weight), "bias": bias}
    return {leaf: value for leaf, value in sums.items() if _has(module, leaf)}


# One function a kind of layer.


def _linear(module: nn.Linear, given: Tensor, back: Tensor) -> Gradients:
    if given.dim() == 2:
        return {"weight": back.unsqueeze(2) * given.unsqueeze(1), "bias": back.clone()}
    return _of_products(module, given, back)


def _convolution(module: Any, given: Tensor, back: Tensor) -> Gradients:
    if _takes_patches(module):
        return _of_products(module, given, back)
    given, padding = padded_input(module, given)
    samples, channels, outputs = len(given), given.shape[1], back.shape[1]
    # All samples as groups of one convolution, whose parameters have a copy for every sample.
    weight = module.weight.new_empty(1).expand(samples * outputs, *module.weight.shape[1:])
    _, of_weight, of_bias = torch.ops.aten.convolution_backward(
        back.reshape(1, samples * outputs, *back.shape[2:]),
        given.reshape(1, samples * channels, *given.shape[2:]),
        weight,
        [samples * outputs],
        module.stride,
        padding,
        module.dilation,
        False,
        [0] * len(module.stride),
        samples * module.groups,
        [False, True, True],
    )
    return {
        "weight": of_weight.reshape(samples, *module.weight.shape),
        "bias": of_bias.reshape(samples, outputs),
    }


def _normalised(module: Any, given: Tensor, back: Tensor, unit: Tensor, dims: int) -> Gradients:
    """Gradients of an affine map whose parameters have the last or channel dimension.

    Args:
        unit: what the affine map is applied to.
        dims: how many last dimensions the parameters have; 0 when they have that of the channels.
    """
    products = back * unit
    inner = list(range(1, back.dim() - dims)) if dims else list(range(2, back.dim()))
    if not inner:
        return {"weight": products, "bias": back.clone()}
    return {"weight": products.sum(inner), "bias": back.sum(inner)}


def _layer_norm(module: nn.LayerNorm, given: Tensor, back: Tensor) -> Gradients:
    shape = module.normalized_shape
    unit = F.layer_norm(given, shape, None, None, module.eps)
    return _normalised(module, given, back, unit, len(shape))


def _rms_norm(module: Any, given: Tensor, back: Tensor) -> Gradients:
    shape = module.normalized_shape
    unit = F.rms_norm(given, shape, None, module.eps)
    return _normalised(module, given, back, unit, len(shape))


def _group_norm(module: nn.GroupNorm, given: Tensor, back: Tensor) -> Gradients:
    unit = F.group_norm(given, module.num_groups, None, None, module.eps)
    return _normalised(module, given, back, unit, 0)


def _batch_norm(module: Any, given: Tensor, back: Tensor) -> Gradients:
    mean, variance = module.running_mean, module.running_var
    unit = F.batch_norm(given, mean, variance, None, None, False, 0.0, module.eps)
    return _normalised(module, given, back, unit, 0)


def _embedding(module: nn.Embedding, given: Tensor, back: Tensor) -> Gradients:
    samples, (rows, width) = len(given), module.weight.shape
    places = given.reshape(samples, -1) + rows * torch.arange(samples).unsqueeze(1).to(given.device)
    gradient = back.new_zeros(samples * rows, width)
    gradient.index_add_(0, places.reshape(-1), back.reshape(-1, width))
    gradient = gradient.view(samples, rows, width)
    if module.padding_idx is not None:
        gradient[:, module.padding_idx] = 0
    return {"weight": gradient}


def _embedding_squares(module: nn.Embedding, given: Tensor, back: Tensor) -> Tensor:
    """Without a table for each sample: only rows that a sample has are there."""
    rows, width = module.weight.shape
    samples = torch.arange(len(given), device=given.device).unsqueeze(1)
    pairs = (samples * rows + given.reshape(len(given), -1)).reshape(-1)
    found, where = torch.unique(pairs, return_inverse=True)
    gradient = back.new_zeros(len(found), width).index_add_(0, where, back.reshape(-1, width))
    row = found % rows
    sums = back.new_zeros(rows, width).index_add_(0, row, gradient.square_())
    if module.padding_idx is not None:
        sums[module.padding_idx] = 0
    return sums


_RULES: dict[type[Any], PerSample] = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
    nn.GroupNorm: _group_norm,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.BatchNorm3d: _batch_norm,
    nn.Embedding: _embedding,
}
