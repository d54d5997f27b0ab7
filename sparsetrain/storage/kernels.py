"""Passes over whole tensors that a training step cannot avoid, made cheap."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

_INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Below this many elements handing half of the work to a second thread costs more than it saves.
_PARALLEL_FROM = 1 << 19

_pool: ThreadPoolExecutor | None = None


def _forget_pool() -> None:
    global _pool
    _pool = None


# A forked child inherits the pool object but not its threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


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
    threads = min(torch.get_num_threads(), 8)
    rows = bits.shape[0] if bits.ndim else 0
    if bits.size < _PARALLEL_FROM or threads == 1 or rows < threads:
        np.multiply(bits, keep, out=bits)
        return
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(max_workers=7, thread_name_prefix="sparsetrain")
    cuts = [rows * i // threads for i in range(threads + 1)]
    parts = [slice(a, b) for a, b in pairwise(cuts)]
    waiting = [_pool.submit(np.multiply, bits[part], keep[part], bits[part]) for part in parts[1:]]
    np.multiply(bits[parts[0]], keep[parts[0]], out=bits[parts[0]])
    for job in waiting:
        job.result()


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
