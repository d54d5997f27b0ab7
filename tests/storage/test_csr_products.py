"""Products of sparse matrices against dense ones, for each set of kernels."""

from __future__ import annotations

import itertools

import pytest
import torch
from csr_problems import (
    HAS_NUMBA,
    KERNELS,
    Problem,
    chosen,
    dense_of,
    fresh_memory_is_nan,  # noqa: F401 - a fixture
    needs_numba,
    pattern_of,
    threads,
)
from hypothesis import given, settings
from hypothesis import strategies as some
from sparse_twins import random_mask

from sparsetrain.storage.csr import torch_kernels
from sparsetrain.storage.csr.pattern import Pattern

BATCHES = [0, 1, 2, 3, 7, 15, 16, 17, 31, 33, 64, 100, 127, 128, 129, 200, 259]


PATTERNS = ["none", "few", "some", "all"]


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("choice", "dtype"), KERNELS)
def test_kernels_are_exact_at_every_batch(
    choice: str, dtype: torch.dtype, batch: int, number: int
) -> None:
    module = chosen(choice, dtype)
    shapes = [(1, 1), (5, 9), (70, 33)]
    with threads(number):
        for kind, (seed, shape) in itertools.product(PATTERNS, enumerate(shapes)):
            Problem(pattern_of(kind, shape, seed), batch, dtype, seed).check(module)


@needs_numba
@pytest.mark.parametrize("batch", [144, 200, 256, 400])
def test_rows_that_are_packed_tile_by_tile(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = chosen("numba", torch.float32)
    monkeypatch.setattr(module, "_CACHED", 0)
    for kind, shape in itertools.product(PATTERNS, [(5, 9), (70, 33)]):
        Problem(pattern_of(kind, shape, 1), batch, torch.float32).check(module)


@settings(max_examples=60)
@given(
    rows=some.integers(1, 40),
    columns=some.integers(1, 90),
    density=some.floats(0, 1),
    batch=some.sampled_from(BATCHES),
    seed=some.integers(0, 10**6),
)
def test_kernels_are_exact_for_any_shape(
    rows: int, columns: int, density: float, batch: int, seed: int
) -> None:
    mask = torch.rand(rows * columns, generator=torch.Generator().manual_seed(seed)) < density
    pattern = Pattern.of(mask.nonzero().view(-1), (rows, columns))
    for choice in ("torch", "numba") if HAS_NUMBA else ("torch",):
        Problem(pattern, batch, torch.float32, seed).check(chosen(choice, torch.float32))
    Problem(pattern, batch, torch.float64, seed).check(torch_kernels)


@pytest.mark.parametrize(("choice", "dtype"), KERNELS)
def test_long_sums_are_as_close_as_their_dtype(choice: str, dtype: torch.dtype) -> None:
    """One row that holds nearly everything, and rows of one entry: chunks are cut by non-zeros."""
    mask = random_mask((40, 3000), 0.001)
    mask[7] = True
    pattern = Pattern.of(mask.view(-1).nonzero().view(-1), (40, 3000))
    generator = torch.Generator().manual_seed(1)
    values, bias = torch.randn(pattern.nnz, generator=generator), torch.randn(40)
    module, accuracy = chosen(choice, dtype), {torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    for batch in (1, 13, 150):
        x = torch.randn(3000, batch, generator=generator)
        grad = torch.randn(40, batch, generator=generator)
        weight = dense_of(pattern, values.double())
        x64, grad64, at = x.double(), grad.double(), pattern.flat()
        wanted = (
            weight @ x64 + bias.double()[:, None],
            weight.t() @ grad64,
            (grad64 @ x64.t()).view(-1)[at],
        )
        scale = (
            weight.abs() @ x64.abs() + bias.double().abs()[:, None],
            weight.t().abs() @ grad64.abs(),
            (grad64.abs() @ x64.abs().t()).view(-1)[at],
        )
        x, grad, v, b = x.to(dtype), grad.to(dtype), values.to(dtype), bias.to(dtype)
        found = (module.product(pattern, v, x, b), *module.gradients(pattern, v, x, grad))
        alone = (module.input_gradient(pattern, v, grad), module.values_gradient(pattern, x, grad))
        for mine, right, size in zip(
            found + alone, wanted + wanted[1:], scale + scale[1:], strict=True
        ):
            assert ((mine.double() - right).abs() <= accuracy * size).all()


@pytest.mark.parametrize(("choice", "dtype"), KERNELS)
def test_a_nan_or_infinite_number_reaches_what_it_is_connected_to(
    choice: str, dtype: torch.dtype
) -> None:
    pattern = pattern_of("some", (30, 20), 3)
    module, rows, columns = chosen(choice, dtype), pattern.rows().long(), pattern.columns.long()
    for batch, bad in itertools.product((1, 5, 40), (float("nan"), float("inf"), -float("inf"))):
        values, x = torch.ones(pattern.nnz, dtype=dtype), torch.ones(20, batch, dtype=dtype)
        x[int(columns[4]), batch // 2] = bad
        out = module.product(pattern, values, x, None)
        reached = torch.zeros(30, batch, dtype=torch.bool)
        reached[rows[columns == columns[4]], batch // 2] = True
        counts = pattern.pointers.diff()[:, None].to(dtype).expand(30, batch)
        wanted = torch.where(reached, torch.tensor(bad, dtype=dtype), counts)
        assert torch.equal(out.nan_to_num(7.5, 1e9, -1e9), wanted.nan_to_num(7.5, 1e9, -1e9))

        grad = torch.ones(30, batch, dtype=dtype)
        grad[int(rows[4]), batch // 2] = bad
        for found in (
            module.values_gradient(pattern, torch.ones(20, batch, dtype=dtype), grad),
            module.gradients(pattern, values, torch.ones(20, batch, dtype=dtype), grad)[1],
        ):
            wanted = torch.full((pattern.nnz,), float(batch), dtype=dtype)
            wanted[rows == rows[4]] = bad
            assert torch.equal(found.nan_to_num(7.5, 1e9, -1e9), wanted.nan_to_num(7.5, 1e9, -1e9))
        for found in (
            module.input_gradient(pattern, values, grad),
            module.gradients(pattern, values, x, grad)[0],
        ):
            reached = torch.zeros(20, batch, dtype=torch.bool)
            reached[columns[rows == rows[4]], batch // 2] = True
            assert torch.equal(~found.isfinite(), reached)
        values[4] = bad
        out = module.product(pattern, values, torch.ones(20, batch, dtype=dtype), None)
        assert torch.equal((~out.isfinite()).any(1).nonzero().view(-1), rows[4].view(1))


@pytest.mark.parametrize(("choice", "dtype"), KERNELS)
def test_opposite_infinities_make_nan(choice: str, dtype: torch.dtype) -> None:
    module = chosen(choice, dtype)
    pattern = Pattern.of(torch.arange(40), (1, 40))
    for batch in (1, 3, 20):
        x = torch.ones(40, batch, dtype=dtype)
        x[3], x[30] = float("inf"), -float("inf")
        assert module.product(pattern, torch.ones(40, dtype=dtype), x, None).isnan().all()


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize(("choice", "dtype"), KERNELS)
def test_matrices_are_transposed(choice: str, dtype: torch.dtype, number: int) -> None:
    module = chosen(choice, dtype)
    sizes = [0, 1, 2, 7, 8, 9, 15, 16, 17, 33, 64]
    with threads(number):
        for rows, columns in itertools.product(sizes, sizes):
            x = torch.arange(rows * columns, dtype=dtype).view(rows, columns)
            turned = module.transposed(x)
            assert turned.is_contiguous() and torch.equal(turned, x.t())
