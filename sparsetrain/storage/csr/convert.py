"""Turning a dense layer into a sparse one in place, and back.

The module stays the same object (its class changes, as in `torch.nn.utils.parametrize`), so hooks,
aliases and names stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from sparsetrain.storage.csr.layers import (
    DTYPES,
    FollowingLinear,
    SparseConv2d,
    SparseLayer,
    SparseLinear,
)
from sparsetrain.storage.csr.pattern import Pattern, as_matrix

_SPARSE: dict[type[nn.Module], type[SparseLayer]] = {
    nn.Linear: SparseLinear,
    FollowingLinear: SparseLinear,
    nn.Conv2d: SparseConv2d,
}
_DENSE: dict[type[nn.Module], type[nn.Module]] = {
    SparseLinear: nn.Linear,
    SparseConv2d: nn.Conv2d,
}


def why_not(module: nn.Module) -> str:
    """Why csr storage cannot hold the weight of this module; empty when it can."""
    if type(module) not in _SPARSE:
        return f"{type(module).__name__} has no sparse form"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed from other parameters"
    if weight.device.type != "cpu":
        return f"it is on {weight.device.type}, and csr computes on the CPU"
    if weight.dtype not in DTYPES:
        return f"its dtype is {str(weight.dtype).removeprefix('torch.')}, not float32 or float64"
    if isinstance(module, nn.Conv2d):
        if module.groups != 1:
            return "it is a grouped convolution"
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            return "its padding is not a number of zeros"
    return ""


@torch.no_grad()
def sparsify(module: nn.Module, mask: Tensor) -> SparseLayer:
    """Hold the weight of `module` by the values at `mask`; the dense parameter goes.

    Args:
        mask: bool, of the weight's shape.

    Raises:
        ValueError: the module has no sparse form; it is then as it was.
    """
    if reason := why_not(module):
        raise ValueError(f"cannot hold {module} sparse: {reason}")
    weight = module._parameters["weight"]
    assert weight is not None  # checked above
    flat = mask.reshape(-1).nonzero().view(-1)
    pattern = Pattern.of(flat, as_matrix(tuple(weight.shape)))
    values = Parameter(weight.detach().reshape(-1)[flat], requires_grad=weight.requires_grad)
    sparse_class = _SPARSE[type(module)]
    _replace_parameter(module, "weight", "values", values)
    module.__class__ = sparse_class
    assert isinstance(module, SparseLayer)
    module.tape = None
    module.hold(values, pattern, tuple(weight.shape))
    return module


@torch.no_grad()
def densify(layer: SparseLayer) -> Parameter:
    """Make the layer the dense one that it stands for; returns its weight, with exact zeros."""
    weight = Parameter(layer.to_dense(), requires_grad=layer.values.requires_grad)
    for name in ("pattern", "weight_shape", "tape"):
        delattr(layer, name)
    module: nn.Module = layer
    module.__class__ = _DENSE[type(layer)]
    _replace_parameter(layer, "values", "weight", weight)
    return weight


def follow_layout(modules: Iterable[nn.Module], *, on: bool) -> None:
    """Let dense layers compute in the layout of sparse ones before them, or stop it."""
    before, after = (nn.Linear, FollowingLinear) if on else (FollowingLinear, nn.Linear)
    for module in modules:
        if type(module) is before:
            module.__class__ = after


def _replace_parameter(module: nn.Module, old: str, new: str, parameter: Parameter) -> None:
    """Put `parameter` in the place of another, so that the order of parameters stays."""
    before = dict(module._parameters)
    module._parameters.clear()
    for name, held in before.items():
        if name == old:
            module._parameters[new] = parameter
        else:
            module._parameters[name] = held
