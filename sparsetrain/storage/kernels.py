"""Passes over whole tensors that a training step cannot avoid, made cheap."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_PIECE = 1 << 18


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
    bits = tensor.detach().view(_INTEGER_OF_SIZE[size])
    few = torch.get_num_threads() == 1 or bits.numel() <= _PIECE
    if few or not (bits.is_contiguous() and mask.is_contiguous()):
        array = bits.numpy()  # numpy converts the bools on the way, in small pieces
        np.multiply(array, mask.numpy(), out=array)
    else:
        _multiply_in_pieces(bits.view(-1), mask.view(-1))


def _multiply_in_pieces(bits: Tensor, keep: Tensor) -> None:
    """With all of torch's threads. Its kernel for mixed types is slow, so bools become integers
    first, few enough to stay in the cache."""
    buffer = torch.empty(_PIECE, dtype=bits.dtype)
    for some_bits, some_keep in zip(
        torch.split(bits, _PIECE), torch.split(keep, _PIECE), strict=True
    ):
        factors = buffer[: some_bits.numel()]
        factors.copy_(some_keep)
        some_bits.mul_(factors)


def is_set_at(tensor: Tensor, index: tuple[int, ...]) -> bool:
    """Whether one entry of a CPU tensor is not 0."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.int16)
    return bool(tensor.numpy()[index] != 0)


def first_unset(mask: Tensor) -> tuple[int, ...] | None:
    """Index of the first False of a CPU mask, or None."""
    values = mask.numpy()
    if values.all():
        return None
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
