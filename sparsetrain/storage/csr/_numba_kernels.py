"""Loops over a sparse pattern, compiled by numba for float32. Importing this needs numba.

Everything is feature-major: row i of `x` [features, batch] is one input over the whole batch. Then
one non-zero weight is one multiple of a contiguous row, and the sums stay in registers while a row
of the pattern is walked. A kernel handles tiles of the batch of one width. Arrays are contiguous;
`chunks` is the number of parts to share among threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import llvmlite.binding
import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

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

Array = NDArray[Any]

# A tile of the forward product takes half of the vector registers, 32 of 64 bytes or 16 of 32.
WIDEST = 128 if llvmlite.binding.get_host_cpu_features().get("avx512f") else 64
_SQUARE = 16
_OPTIONS: dict[str, Any] = {
    "parallel": True,
    "fastmath": True,
    "cache": True,
    "boundscheck": False,
    "error_model": "numpy",
}


def tiles(batch: int) -> Iterator[tuple[int, int]]:
    """Cut a batch into tiles (start, width) of powers of two."""
    start, width = 0, WIDEST
    while start < batch:
        while start + width > batch:
            width //= 2
        yield start, width
        start += width


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
def product_kernel(width: int) -> Callable[..., None]:
    """out[:, start : start + width] = W x[:, x_start : x_start + width] + bias."""

    @njit(**_OPTIONS)
    def product(
        pointers: Array,
        columns: Array,
        values: Array,
        x: Array,
        x_start: int,
        bias: Array,
        out: Array,
        start: int,
        chunks: int,
    ) -> None:
        x_batch, batch = x.shape[1], out.shape[1]
        for chunk in prange(chunks):
            for row in range(_cut(pointers, chunk, chunks), _cut(pointers, chunk + 1, chunks)):
                sums = splat(width, bias[row] if bias.shape[0] else np.float32(0))
                for k in range(pointers[row], pointers[row + 1]):
                    one = load(width, x, np.int64(columns[k]) * x_batch + x_start)
                    sums = fma(splat(width, values[k]), one, sums)
                store(out, np.int64(row) * batch + start, sums)

    return product


@cache
def gradients_kernel(width: int) -> Callable[..., None]:
    """For a tile of the batch: grad_x = W^T grad, and grad_values (+)= grad x^T at the non-zeros.

    The pattern is the transposed one.
    """

    @njit(**_OPTIONS)
    def gradients(
        pointers: Array,
        rows: Array,
        values: Array,
        grad: Array,
        grad_start: int,
        x: Array,
        grad_x: Array,
        grad_values: Array,
        start: int,
        chunks: int,
    ) -> None:
        grad_batch, batch = grad.shape[1], x.shape[1]
        for chunk in prange(chunks):
            for column in range(_cut(pointers, chunk, chunks), _cut(pointers, chunk + 1, chunks)):
                own = load(width, x, np.int64(column) * batch + start)
                sums = splat(width, np.float32(0))
                for k in range(pointers[column], pointers[column + 1]):
                    g = load(width, grad, np.int64(rows[k]) * grad_batch + grad_start)
                    sums = fma(splat(width, values[k]), g, sums)
                    part = dot(own, g)
                    grad_values[k] = part if start == 0 else grad_values[k] + part
                store(grad_x, np.int64(column) * batch + start, sums)

    return gradients


@cache
def values_gradient_kernel(width: int) -> Callable[..., None]:
    """For a tile of the batch: grad_values (+)= grad x^T at the non-zeros."""

    @njit(**_OPTIONS)
    def values_gradient(
        pointers: Array,
        columns: Array,
        x: Array,
        x_start: int,
        grad: Array,
        grad_values: Array,
        start: int,
        chunks: int,
    ) -> None:
        x_batch, batch = x.shape[1], grad.shape[1]
        for chunk in prange(chunks):
            for row in range(_cut(pointers, chunk, chunks), _cut(pointers, chunk + 1, chunks)):
                own = load(width, grad, np.int64(row) * batch + start)
                for k in range(pointers[row], pointers[row + 1]):
                    part = dot(own, load(width, x, np.int64(columns[k]) * x_batch + x_start))
                    grad_values[k] = part if start == 0 else grad_values[k] + part

    return values_gradient


@njit(**_OPTIONS)
def pack_kernel(x: Array, start: int, out: Array) -> None:
    """out = x[:, start : start + width]."""
    for row in prange(x.shape[0]):
        for column in range(out.shape[1]):
            out[row, column] = x[row, start + column]


@cache
def vector_kernel() -> Callable[..., None]:
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
                    sum_here += values[k] * x[columns[k], 0]
                    k += 1
                out[row, 0] = sum_here + (bias[row] if bias.shape[0] else np.float32(0))

    return product


@njit(**_OPTIONS)
def take(source: Array, places: Array, out: Array) -> None:
    """out[i] = source[places[i]]."""
    for i in prange(places.shape[0]):
        out[i] = source[places[i]]


@njit(**_OPTIONS)
def places_kernel(ordered: Array, queries: Array, out: Array, chunks: int) -> None:
    number = queries.shape[0]
    for chunk in prange(chunks):
        first, last = number * chunk // chunks, number * (chunk + 1) // chunks
        if first < last:
            place = np.searchsorted(ordered, queries[first])
            for i in range(first, last):
                while place < ordered.shape[0] and ordered[place] < queries[i]:
                    place += 1
                out[i] = place


@njit(**_OPTIONS)
def transpose_kernel(x: Array, out: Array) -> None:
    """out [columns, rows] = x [rows, columns], transposed in squares."""
    size = _SQUARE
    rows, columns = x.shape
    for strip in prange((columns + size - 1) // size):
        first = strip * size
        whole = rows // size * size if first + size <= columns else 0
        for row in range(0, whole, size):
            transpose(size, x, row * columns + first, columns, out, first * rows + row, rows)
        for column in range(first, min(first + size, columns)):
            for row in range(whole, rows):
                out[column, row] = x[row, column]
