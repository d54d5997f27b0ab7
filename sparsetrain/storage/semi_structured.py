"""2:4 sparsity on GPUs that multiply it twice as fast as dense weights."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from sparsetrain.storage.compress import listed, shared_parameters

_CAPABILITY = (8, 0)
_DTYPES = (torch.float16, torch.bfloat16)
# Both of torch's backends take multiples of these; cuSPARSELt alone would take 16 and 16.
_ROWS, _COLUMNS = 32, 64


def semi_structured(model: nn.Module) -> nn.Module:
    """A copy of the model whose 2:4 Linear weights run on sparse tensor cores, for inference.

    A weight is 2:4 if no more than two of each four consecutive inputs are non-zero (Mishra et al.
    2021, section 3), as `NMSparse(n=2, m=4)` trains it. Such weights are held by
    `torch.sparse.to_sparse_semi_structured`, which is a prototype in torch, and are frozen. Every
    other layer is copied as it is.

    Args:
        model: on the GPU, in float16 or bfloat16; stays as it was.

    Raises:
        RuntimeError: there is no CUDA GPU of compute capability 8.0 (Ampere) or later.
        ValueError: no Linear weight can be held so, with the reasons.
    """
    if missing := _missing():
        raise RuntimeError(f"2:4 needs a CUDA GPU of compute capability 8.0 or later: {missing}")
    chosen = _layers_to_convert(model)
    copied = copy.deepcopy(model)
    modules = dict(copied.named_modules())
    with warnings.catch_warnings():  # that it is a prototype is said above
        warnings.simplefilter("ignore", UserWarning)
        for name in chosen:
            weight = modules[name]._parameters["weight"]
            assert weight is not None  # `_layers_to_convert` has looked
            held = torch.sparse.to_sparse_semi_structured(weight.detach().contiguous())
            modules[name].register_parameter("weight", Parameter(held, requires_grad=False))
    return copied


def is_two_of_four(weight: Tensor) -> bool:
    """Whether no more than two of each four consecutive entries of a row are non-zero.

    Args:
        weight: [out, in]; False if `in` is no multiple of 4.
    """
    if weight.dim() != 2 or weight.shape[1] % 4:
        return False
    fours = weight.detach().reshape(-1, 4)
    return bool(((fours != 0).sum(1) <= 2).all())


def why_not(weight: Tensor) -> str:
    """Why a weight cannot be held as 2:4; empty when it can."""
    if weight.dtype not in _DTYPES:
        return f"its dtype is {str(weight.dtype).removeprefix('torch.')}, not float16 or bfloat16"
    is_tiled = weight.dim() == 2 and not (weight.shape[0] % _ROWS or weight.shape[1] % _COLUMNS)
    if not is_tiled or weight.numel() == 0:
        size = " x ".join(map(str, weight.shape))
        return f"it is {size}, not multiples of {_ROWS} outputs and {_COLUMNS} inputs"
    if not is_two_of_four(weight):
        return "more than two of some four consecutive inputs are non-zero"
    if not weight.is_cuda:
        return f"it is on {weight.device.type}: move the model to the GPU"
    return ""


def _missing() -> str:
    if not torch.cuda.is_available():
        return "torch finds no GPU here"
    capability = torch.cuda.get_device_capability()
    if capability < _CAPABILITY:
        return f"this one has {capability[0]}.{capability[1]}"
    return ""


def _layers_to_convert(model: nn.Module) -> list[str]:
    chosen, reasons = [], []
    shared = shared_parameters(model)
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if type(module) is not nn.Linear or weight is None:
            continue
        reason = "its weight is shared" if id(weight) in shared else why_not(weight)
        if reason:
            reasons.append(f"{name or 'Linear'}: {reason}")
        else:
            chosen.append(name)
    if not chosen:
        raise ValueError("no layer can be held as 2:4: " + listed(reasons))
    return chosen
