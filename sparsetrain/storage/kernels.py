"""Passes over whole tensors that a training step cannot avoid, made cheap."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparsetrain._threads import pieces, share_out

_INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def keep_where_(tensor: Tensor, mask: Tensor) -> None:
    """Set `tensor` to exactly 0 in place wherever `mask` is False, NaN and infinities included.

    Args:
        tensor: floating point, any shape and device.
        mask: bool, same shape and device.
    """
    size = tensor.element_size()
    if tensor.device.type != "cpu" or type(mask) is not Tensor or size not in _INTEGER_OF_SIZE:
        tensor.masked_fill_(~mask, 0)
        return
    # Multiplying the bits as integers by 0 or 1 clears or keeps them whatever float they spell.
    # numpy converts the bool in cache-sized pieces; torch's mixed-type kernels are 2-4x slower.
    bits = tensor.detach().view(_INTEGER_OF_SIZE[size]).numpy()
    _multiply(bits, mask.numpy())


def _multiply(bits: np.ndarray, keep: np.ndarray) -> None:
    if bits.ndim == 0:
        np.multiply(bits, keep, out=bits)
        return
    parts = pieces(bits.shape[0], bits.size)
    share_out(lambda part: np.multiply(bits[part], keep[part], out=bits[part]), parts)


def is_set_at(tensor: Tensor, index: tuple[int, ...]) -> bool:
    """Whether one entry of a CPU tensor is not 0."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.int16)
    return bool(tensor.numpy()[index] != 0)


def first_unset(mask: Tensor) -> tuple[int, ...]:
    """Index of the first False of a CPU mask that has one."""
    values = mask.numpy()
    return tuple(int(i) for i in np.unravel_index(values.argmin(), values.shape))


def read_flat(tensor: Tensor, indices: Tensor) -> Tensor:
    """Values of `tensor` at flat (row-major) `indices`, whatever its memory layout."""
    if tensor.is_contiguous():
        return tensor.view(-1)[indices]
    return tensor[torch.unravel_index(indices, tensor.shape)]


def write_flat_(tensor: Tensor, indices: Tensor, values: Tensor | float) -> None:
    """Write `values` at flat (row-major) `indices`, whatever the memory layout."""
    if tensor.is_contiguous():
        tensor.view(-1)[indices] = values
    else:
        tensor[torch.unravel_index(indices, tensor.shape)] = values
