"""Masks as bits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def pack_mask(mask: Tensor) -> Tensor:
    """Eight bools a byte: uint8 tensor [ceil(numel / 8)] on the CPU."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1)))


def unpack_mask(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Inverse of `pack_mask`."""
    count = int(np.prod(shape, dtype=np.int64))
    bits = np.unpackbits(packed.cpu().numpy(), count=count)
    return torch.from_numpy(bits.astype(bool)).reshape(shape)


def packed_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Shape of the packed rows of a mask: [rows, bytes a row]."""
    return shape[0], -(-columns_of(shape) // 8)


def pack_rows(mask: Tensor) -> Tensor:
    """Each row (of dimension 0) by itself, eight bools a byte: uint8, where the mask is.

    Rows can then be shared out over ranks without unpacking them.
    """
    rows = mask.cpu().numpy().reshape(mask.shape[0], columns_of(mask.shape))
    if rows.size == 0:
        return torch.empty(packed_shape(mask.shape), dtype=torch.uint8, device=mask.device)
    return torch.from_numpy(np.packbits(rows, axis=1)).to(mask.device)


def unpack_rows(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Inverse of `pack_rows`, on the CPU."""
    columns = columns_of(shape)
    if packed.numel() == 0:
        return torch.zeros(shape, dtype=torch.bool)
    bits = np.unpackbits(packed.cpu().numpy(), axis=1, count=columns)
    return torch.from_numpy(bits.astype(bool)).reshape(shape)


def columns_of(shape: tuple[int, ...]) -> int:
    """Weights in a row."""
    return int(np.prod(shape[1:], dtype=np.int64))
