"""The products of a sparse layer by numba: float32 on the CPU. Importing this needs numba.

All matrices are feature-major: x [features, batch]. The batch is cut into tiles of powers of two.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparsetrain._numba_threads import numba_chunks
from sparsetrain.storage.csr import torch_kernels
from sparsetrain.storage.csr._numba_kernels import (
    WIDEST,
    Array,
    gradients_kernel,
    pack_kernel,
    places_kernel,
    product_kernel,
    take,
    tiles,
    transpose_kernel,
    values_gradient_kernel,
    vector_kernel,
)
from sparsetrain.storage.csr.pattern import Pattern

# A batch that leaves narrow tiles over walks the pattern again for them; torch's kernels do not.
_WHOLE_TILE = 16
# Bytes of a matrix that stays in the cache however its rows lie.
_CACHED = 1 << 21
_NO_BIAS = np.empty(0, dtype=np.float32)


def product(pattern: Pattern, values: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """W x + bias: [columns, batch] -> [rows, batch]."""
    if not _has_whole_tiles(x):
        return torch_kernels.product(pattern, values, x, bias)
    out = _new(pattern.shape[0], x.shape[1])
    begin = _NO_BIAS if bias is None else _array(bias)
    _multiply(*pattern.arrays, _array(values), _array(x), begin, out)
    return torch.from_numpy(out)


def input_gradient(pattern: Pattern, values: Tensor, grad: Tensor) -> Tensor:
    """W^T grad: [rows, batch] -> [columns, batch]."""
    if not _has_whole_tiles(grad):
        return torch_kernels.input_gradient(pattern, values, grad)
    pointers, rows, order, _ = pattern.transposed_arrays
    out = _new(pattern.shape[1], grad.shape[1])
    _multiply(pointers, rows, _taken(_array(values), order), _array(grad), _NO_BIAS, out)
    return torch.from_numpy(out)


def values_gradient(pattern: Pattern, x: Tensor, grad: Tensor) -> Tensor:
    """grad x^T at the non-zeros: [nnz]."""
    batch = x.shape[1]
    if batch == 0:
        return torch.zeros(pattern.nnz)
    out = _new(pattern.nnz)
    wide, narrow = _array(x), _array(grad)
    with numba_chunks() as chunks:
        for start, width in tiles(batch):
            block, at = _block(wide, start, width)
            values_gradient_kernel(width)(*pattern.arrays, block, at, narrow, out, start, chunks)
    return torch.from_numpy(out)


def gradients(pattern: Pattern, values: Tensor, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Both gradients, of the input and of the values, in one walk over the columns."""
    batch = x.shape[1]
    if batch <= 1:  # the product has a kernel of its own for one
        return input_gradient(pattern, values, grad), values_gradient(pattern, x, grad)
    pointers, rows, order, place = pattern.transposed_arrays
    grad_x, by_columns = _new(pattern.shape[1], batch), _new(pattern.nnz)
    turned = _taken(_array(values), order)
    wide, narrow = _array(grad), _array(x)
    with numba_chunks() as chunks:
        for start, width in tiles(batch):
            block, at = _block(wide, start, width)
            gradients_kernel(width)(
                pointers, rows, turned, block, at, narrow, grad_x, by_columns, start, chunks
            )
    return torch.from_numpy(grad_x), torch.from_numpy(_taken(by_columns, place))


def transposed(x: Tensor) -> Tensor:
    """[rows, columns] -> [columns, rows], both contiguous."""
    rows, columns = x.shape
    out = _new(columns, rows)
    with numba_chunks():
        transpose_kernel(_array(x), out)
    return torch.from_numpy(out)


def places(ordered: Tensor, queries: Tensor) -> Tensor:
    """Where each query would be inserted; both int64, contiguous and ascending."""
    out = torch.empty_like(queries)
    with numba_chunks() as chunks:
        places_kernel(ordered.numpy(), queries.numpy(), out.numpy(), chunks)
    return out


def _multiply(
    pointers: Array, indices: Array, values: Array, x: Array, bias: Array, out: Array
) -> None:
    with numba_chunks() as chunks:
        if x.shape[1] == 1:
            vector_kernel()(pointers, indices, values, x, bias, out, chunks)
            return
        for start, width in tiles(x.shape[1]):
            block, at = _block(x, start, width)
            product_kernel(width)(pointers, indices, values, block, at, bias, out, start, chunks)


def _has_whole_tiles(x: Tensor) -> bool:
    return x.shape[1] == 1 or x.shape[1] % _WHOLE_TILE == 0


def _block(x: Array, start: int, width: int) -> tuple[Array, int]:
    """An array that has columns start to start + width, and where they begin in it.

    Rows are visited at random and again. Parts of long rows, whose distance is often a power of
    two, would share few places of the cache, so they are put together first.
    """
    if x.shape[1] <= WIDEST or x.nbytes <= _CACHED:
        return x, start
    block = _new(x.shape[0], width)
    pack_kernel(x, start, block)
    return block, 0


def _taken(source: Array, places: Array) -> Array:
    out = _new(places.size)
    with numba_chunks():
        take(source, places, out)
    return out


def _new(*shape: int) -> Array:
    # numpy asks the system for huge pages where an array is large, torch does not.
    return np.empty(shape, dtype=np.float32)


def _array(tensor: Tensor) -> Array:
    array: Array = (tensor.detach() if tensor.requires_grad else tensor).numpy()
    return array
