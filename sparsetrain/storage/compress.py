"""Making a trained model whose weights hold zeros run on those that are not zero."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from sparsetrain.storage.csr.convert import sparsify, why_not
from sparsetrain.storage.csr.layers import SparseLayer

_NAMED = 5  # layers that an error message lists


def compress(model: nn.Module, *, min_sparsity: float = 0.5) -> nn.Module:
    """A copy of the model in which sparse enough layers keep and multiply non-zeros alone.

    Linear and Conv2d layers on the CPU in float32 or float64 become `SparseLinear` and
    `SparseConv2d`; every other layer is copied as it is. So are layers that share their weight
    with another one, since a shared weight would fall apart into two. Zeros are exact ones, as
    `optimizer.finalize()` leaves them.

    Args:
        model: stays as it was. Call `finalize()` first if a `SparseOptimizer` trains it.
        min_sparsity: share of zeros, in [0, 1], from which on a layer is converted. With half of
            them, float32 values and their int32 places take the memory of the dense weight.
            Products need more zeros to be faster; how many depends on shapes and machine.

    Returns:
        The copy, in train or eval mode as the model. Its outputs differ by rounding, and where an
        input is infinite or NaN: what would meet a zero is skipped.

    Raises:
        ValueError: no layer can be converted, with the reasons, or `min_sparsity` is out of range.
    """
    chosen = layers_to_hold_sparse(model, share_of_zeros, min_sparsity)
    copied = copy.deepcopy(model)
    modules = dict(copied.named_modules())
    for name in chosen:
        weight = modules[name]._parameters["weight"]
        assert weight is not None  # `layers_to_hold_sparse` has looked
        sparsify(modules[name], weight.detach() != 0)
    return copied


def share_of_zeros(name: str, layer: nn.Module) -> float:
    """Share of exact zeros in the weight of a dense layer, in [0, 1]; 0 for an empty one."""
    weight = layer._parameters["weight"]
    assert weight is not None  # asked of layers that csr can hold
    return 1 - int(torch.count_nonzero(weight.detach())) / weight.numel() if weight.numel() else 0.0


def layers_to_hold_sparse(
    model: nn.Module, zeros: Callable[[str, nn.Module], float], min_sparsity: float
) -> list[str]:
    """Names of the dense layers that csr can hold and that are sparse enough.

    Args:
        zeros: name of a layer and the layer -> the share of zeros that its weight will have.

    Raises:
        ValueError: there is none, and no layer of the model is sparse already.
    """
    if not 0 <= min_sparsity <= 1:
        raise ValueError(f"min_sparsity={min_sparsity} is a share of zeros: give 0 to 1")
    chosen, reasons = [], []
    shared = shared_parameters(model)
    for name, module in model.named_modules():
        if not _has_matrix(module):
            continue
        reason = why_not(module) or _why_shared(module, name, shared)
        if not reason and (share := zeros(name, module)) < min_sparsity:
            reason = f"{share:.1%} of its weights are zero, below min_sparsity={min_sparsity}"
        if reason:
            reasons.append(f"{name or type(module).__name__}: {reason}")
        else:
            chosen.append(name)
    if not chosen and not any(isinstance(module, SparseLayer) for module in model.modules()):
        raise ValueError("no layer can be held sparse: " + listed(reasons))
    return chosen


def shared_parameters(model: nn.Module) -> dict[int, list[str]]:
    """Id of each parameter that several modules have in common -> its names."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                names.setdefault(id(parameter), []).append(f"{name}.{leaf}" if name else leaf)
    return {key: found for key, found in names.items() if len(found) > 1}


def listed(reasons: list[str]) -> str:
    """The first few reasons of many, as one line."""
    if not reasons:
        return "the model has no weight matrix"
    rest = len(reasons) - _NAMED
    return "; ".join(reasons[:_NAMED]) + (f"; and {rest} more" if rest > 0 else "")


def _has_matrix(module: nn.Module) -> bool:
    return any(held is not None and held.dim() >= 2 for held in module._parameters.values())


def _why_shared(module: nn.Module, name: str, shared: dict[int, list[str]]) -> str:
    names = shared.get(id(module._parameters["weight"]), [])
    others = [other for other in names if other != f"{name}.weight"]
    return f"its weight is also {others[0]}" if others else ""
