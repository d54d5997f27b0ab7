"""The products of a sparse layer in numba, for float32 on the CPU. Importing this needs numba.

Everything is feature-major: row i of `x` [features, batch] is one input over the whole batch. Then
one non-zero weight is one multiple of a contiguous row, which stays in registers while a row of the
pattern is walked. The batch is cut into tiles as wide as the registers allow.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import llvmlite.binding
import numba
import numpy as np
import torch
from numba import njit, prange
from numpy.typing import NDArray
from torch import Tensor

from sparsetrain.storage.csr._simd import (
    add,
    dot,
    fma,
    gather,
    load,
    splat,
    store,
    total,
    transpose,
)
from sparsetrain.storage.csr.pattern import Pattern

Array = NDArray[Any]

# A tile of the forward product takes half of the vector registers, 32 of 64 bytes or 16 of 32.
_WIDEST = 128 if llvmlite.binding.get_host_cpu_features().get("avx512f") else 64
_CHUNKS_A_THREAD = 4
_SQUARE = 16
_OPTIONS: dict[str, Any] = {
    "parallel": True,
    "fastmath": True,
    "cache": True,
    "boundscheck": False,
    "error_model": "numpy",
}


def tiles(batch: int, widest: int = _WIDEST) -> Iterator[tuple[int, int, int]]:
    """Cut a batch into (start, width, number) runs of tiles, widths being powers of two."""
    start, width = 0, widest
    while start < batch:
        number = (batch - start) // width
        if number:
            yield start, width, number
            start += number * width
        width //= 2


@njit(inline="always")
def _cut(pointers: Array, chunk: int, chunks: int) -> int:
    """First row of a chunk, so that all chunks hold about the same number of non-zeros."""
    if chunk == 0:
        return 0
    rows = pointers.shape[0] - 1
    if chunk == chunks:
        return rows
    return np.searchsorted(pointers, pointers[rows] * chunk // chunks)


@cache
def _product_kernel(width: int) -> Callable[..., None]:
    @njit(**_OPTIONS)
    def product(
        pointers: Array,
        columns: Array,
        values: Array,
        x: Array,
        bias: Array,
        out: Array,
        batch: int,
        start: int,
        number: int,
        chunks: int,
    ) -> None:
        for chunk in prange(chunks):
            first, last = _cut(pointers, chunk, chunks), _cut(pointers, chunk + 1, chunks)
            for tile in range(number):
                at = start + tile * width
                for row in range(first, last):
                    sums = splat(width, bias[row] if bias.shape[0] else np.float32(0))
                    for k in range(pointers[row], pointers[row + 1]):
                        sums = fma(
                            splat(width, values[k]),
                            load(width, x, np.int64(columns[k]) * batch + at),
                            sums,
                        )
                    store(out, np.int64(row) * batch + at, sums)

    return product


@cache
def _gradients_kernel(width: int) -> Callable[..., None]:
    @njit(**_OPTIONS)
    def gradients(
        pointers: Array,
        rows: Array,
        values: Array,
        x: Array,
        grad: Array,
        grad_x: Array,
        grad_values: Array,
        batch: int,
        start: int,
        number: int,
        chunks: int,
    ) -> None:
        for chunk in prange(chunks):
            first, last = _cut(pointers, chunk, chunks), _cut(pointers, chunk + 1, chunks)
            for tile in range(number):
                at = start + tile * width
                for column in range(first, last):
                    own = load(width, x, np.int64(column) * batch + at)
                    sums = splat(width, np.float32(0))
                    for k in range(pointers[column], pointers[column + 1]):
                        g = load(width, grad, np.int64(rows[k]) * batch + at)
                        sums = fma(splat(width, values[k]), g, sums)
                        part = dot(own, g)
                        grad_values[k] = part if at == 0 else grad_values[k] + part
                    store(grad_x, np.int64(column) * batch + at, sums)

    return gradients


@cache
def _values_gradient_kernel(width: int) -> Callable[..., None]:
    @njit(**_OPTIONS)
    def values_gradient(
        pointers: Array,
        columns: Array,
        x: Array,
        grad: Array,
        grad_values: Array,
        batch: int,
        start: int,
        number: int,
        chunks: int,
    ) -> None:
        for chunk in prange(chunks):
            first, last = _cut(pointers, chunk, chunks), _cut(pointers, chunk + 1, chunks)
            for tile in range(number):
                at = start + tile * width
                for row in range(first, last):
                    own = load(width, grad, np.int64(row) * batch + at)
                    for k in range(pointers[row], pointers[row + 1]):
                        part = dot(own, load(width, x, np.int64(columns[k]) * batch + at))
                        grad_values[k] = part if at == 0 else grad_values[k] + part

    return values_gradient


@cache
def _vector_kernel() -> Callable[..., None]:
    """For a batch of one: 16 inputs are gathered at once."""
    width = 16

    @njit(**_OPTIONS)
    def product(
        pointers: Array,
        columns: Array,
        values: Array,
        x: Array,
        bias: Array,
        out: Array,
        chunks: int,
    ) -> None:
        for chunk in prange(chunks):
            for row in range(_cut(pointers, chunk, chunks), _cut(pointers, chunk + 1, chunks)):
                k, stop = np.int64(pointers[row]), np.int64(pointers[row + 1])
                one = splat(width, np.float32(0))
                two = one
                while k + 2 * width <= stop:  # two sums, because one would wait for itself
                    one = fma(load(width, values, k), gather(width, x, columns, k), one)
                    two = fma(
                        load(width, values, k + width), gather(width, x, columns, k + width), two
                    )
                    k += 2 * width
                if k + width <= stop:
                    one = fma(load(width, values, k), gather(width, x, columns, k), one)
                    k += width
                sum_here = total(add(one, two))
                while k < stop:
                    sum_here += values[k] * x[columns[k]]
                    k += 1
                out[row] = sum_here + (bias[row] if bias.shape[0] else np.float32(0))

    return product


@njit(**_OPTIONS)
def take(source: Array, places: Array, out: Array) -> None:
    """out[i] = source[places[i]]."""
    for i in prange(places.shape[0]):
        out[i] = source[places[i]]


@njit(**_OPTIONS)
def _places_kernel(ordered: Array, queries: Array, out: Array, chunks: int) -> None:
    number = queries.shape[0]
    for chunk in prange(chunks):
        first, last = number * chunk // chunks, number * (chunk + 1) // chunks
        if first < last:
            place = np.searchsorted(ordered, queries[first])
            for i in range(first, last):
                while place < ordered.shape[0] and ordered[place] < queries[i]:
                    place += 1
                out[i] = place


def places(ordered: Tensor, queries: Tensor) -> Tensor:
    """Where each query would be inserted; both int64, contiguous and ascending."""
    out = torch.empty_like(queries)
    with _one_at_a_time:
        _places_kernel(ordered.numpy(), queries.numpy(), out.numpy(), _chunks())
    return out


@njit(**_OPTIONS)
def _transpose_kernel(x: Array, out: Array, rows: int, columns: int) -> None:
    """out [columns, rows] = x [rows, columns], transposed in squares."""
    size = _SQUARE
    for strip in prange((columns + size - 1) // size):
        first = strip * size
        whole = rows // size * size if first + size <= columns else 0
        for row in range(0, whole, size):
            transpose(size, x, row * columns + first, columns, out, first * rows + row, rows)
        for column in range(first, min(first + size, columns)):
            for row in range(whole, rows):
                out[column * rows + row] = x[row * columns + column]


def transposed(x: Tensor) -> Tensor:
    """[rows, columns] -> [columns, rows], both contiguous."""
    rows, columns = x.shape
    out = torch.empty(columns, rows)
    with _one_at_a_time:
        _chunks()
        _transpose_kernel(_flat(x), _flat(out), rows, columns)
    return out


_NO_BIAS = np.empty(0, dtype=np.float32)
# numba's simplest threading layer, used where OpenMP is missing, dies when it is entered twice.
_one_at_a_time = threading.Lock()
_MOST_THREADS: int = numba.config.NUMBA_NUM_THREADS
_local = threading.local()


def product(pattern: Pattern, values: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """W x + bias: [columns, batch] -> [rows, batch]."""
    batch = x.shape[1]
    out = torch.empty(pattern.shape[0], batch)
    _multiply(*pattern.arrays, _flat(values), x, bias, out)
    return out


def input_gradient(pattern: Pattern, values: Tensor, grad: Tensor) -> Tensor:
    """W^T grad: [rows, batch] -> [columns, batch]."""
    pointers, rows, order, _ = pattern.transposed_arrays
    out = torch.empty(pattern.shape[1], grad.shape[1])
    _multiply(pointers, rows, _taken(_flat(values), order), grad, None, out)
    return out


def values_gradient(pattern: Pattern, x: Tensor, grad: Tensor) -> Tensor:
    """grad x^T at the non-zeros: [nnz]."""
    batch = x.shape[1]
    out = torch.empty(pattern.nnz) if batch else torch.zeros(pattern.nnz)
    arrays = [*pattern.arrays, _flat(x), _flat(grad), _flat(out)]
    with _one_at_a_time:
        chunks = _chunks()
        for start, width, number in tiles(batch):
            _values_gradient_kernel(width)(*arrays, batch, start, number, chunks)
    return out


def gradients(pattern: Pattern, values: Tensor, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Both gradients, of the input and of the values, in one walk over the columns."""
    batch = x.shape[1]
    pointers, rows, order, place = pattern.transposed_arrays
    grad_x = torch.empty(pattern.shape[1], batch)
    if batch == 0:
        return grad_x, torch.zeros(pattern.nnz)
    by_columns = np.empty(pattern.nnz, dtype=np.float32)
    turned = _taken(_flat(values), order)
    arrays = (pointers, rows, turned, _flat(x), _flat(grad), _flat(grad_x), by_columns)
    with _one_at_a_time:
        chunks = _chunks()
        for start, width, number in tiles(batch):
            _gradients_kernel(width)(*arrays, batch, start, number, chunks)
    return grad_x, torch.from_numpy(_taken(by_columns, place))


def _multiply(
    pointers: Array, indices: Array, values: Array, x: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    batch = x.shape[1]
    start_values = _NO_BIAS if bias is None else _flat(bias)
    arrays = (pointers, indices, values, _flat(x), start_values, _flat(out))
    with _one_at_a_time:
        chunks = _chunks()
        if batch == 1:
            _vector_kernel()(*arrays, chunks)
        else:
            for start, width, number in tiles(batch):
                _product_kernel(width)(*arrays, batch, start, number, chunks)


def _taken(source: Array, places: Array) -> Array:
    out = np.empty(places.size, dtype=np.float32)
    with _one_at_a_time:
        _chunks()
        take(source, places, out)
    return out


def _flat(tensor: Tensor) -> Array:
    array: Array = tensor.detach().view(-1).numpy()
    return array


def _chunks() -> int:
    """Use as many threads as torch does; returns into how many chunks to cut the rows."""
    number = min(torch.get_num_threads(), _MOST_THREADS)
    if getattr(_local, "threads", None) != number:  # numba remembers it for each thread
        before = torch.get_num_threads()
        numba.set_num_threads(number)
        torch.set_num_threads(before)  # numba's first call sets OpenMP's number for torch, too
        _local.threads = number
    return _CHUNKS_A_THREAD * number
