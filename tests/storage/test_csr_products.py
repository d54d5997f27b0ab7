"""The products of sparse layers against dense ones, for both sets of kernels."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from sparse_twins import pair, random_mask
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrain.storage.csr import kernels, torch_kernels
from sparsetrain.storage.csr.convert import sparsify
from sparsetrain.storage.csr.layers import SparseConv2d, SparseLinear
from sparsetrain.storage.csr.pattern import Pattern
from sparsetrain.storage.csr.product import Tape

HAS_NUMBA = kernels.numba_kernels() is not None
needs_numba = pytest.mark.skipif(not HAS_NUMBA, reason="numba is not installed")
KERNELS = [
    pytest.param("torch", torch.float64, id="torch64"),
    pytest.param("torch", torch.float32, id="torch32"),
    pytest.param("numba", torch.float32, id="numba32", marks=needs_numba),
]
BATCHES = [0, 1, 2, 3, 7, 15, 16, 17, 31, 33, 64, 100, 127, 128, 129, 200, 259]
PATTERNS = ["none", "few", "some", "all"]


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan() -> Iterator[None]:
    """What a kernel forgets to write is NaN, and not by chance the right number."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    module = kernels.numba_kernels()
    with pytest.MonkeyPatch.context() as patch:
        if hasattr(module, "_new"):  # numpy's arrays are not filled by torch
            patch.setattr(module, "_new", lambda *shape: np.full(shape, np.nan, np.float32))
        yield
    torch.use_deterministic_algorithms(False)


def pattern_of(kind: str, shape: tuple[int, int], seed: int) -> Pattern:
    """Some have empty rows and columns, at both ends too."""
    density = {"none": -1.0, "few": 0.03, "some": 0.3, "all": 2.0}[kind]
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density
    if kind == "some":
        mask[[0, shape[0] // 2, -1]] = False
        mask[:, [0, shape[1] // 2, -1]] = False
    return Pattern.of(mask.view(-1).nonzero().view(-1), shape)


def dense_of(pattern: Pattern, values: Tensor) -> Tensor:
    weight = torch.zeros(pattern.shape[0] * pattern.shape[1], dtype=values.dtype)
    weight[pattern.flat()] = values
    return weight.view(pattern.shape)


def chosen(choice: Any, dtype: torch.dtype) -> ModuleType:
    with kernels.using(choice):
        return kernels.kernels_for(dtype)


class Problem:
    """Small whole numbers: every sum is exact in float32, in whatever order it is made."""

    def __init__(self, pattern: Pattern, batch: int, dtype: torch.dtype, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randint(-8, 9, shape, generator=generator).to(dtype)

        rows, columns = pattern.shape
        self.pattern, self.values, self.bias = pattern, draw(pattern.nnz), draw(rows)
        self.x, self.grad = draw(columns, batch), draw(rows, batch)

    def check(self, module: ModuleType) -> None:
        weight = dense_of(self.pattern, self.values)
        at = self.pattern.flat()
        out = weight @ self.x
        grad_x, grad_values = weight.t() @ self.grad, (self.grad @ self.x.t()).view(-1)[at]
        both = module.gradients(self.pattern, self.values, self.x, self.grad)
        found = {
            "product": (module.product(self.pattern, self.values, self.x, None), out),
            "with bias": (
                module.product(self.pattern, self.values, self.x, self.bias),
                out + self.bias[:, None],
            ),
            "input gradient": (
                module.input_gradient(self.pattern, self.values, self.grad),
                grad_x,
            ),
            "values gradient": (
                module.values_gradient(self.pattern, self.x, self.grad),
                grad_values,
            ),
            "both, of the input": (both[0], grad_x),
            "both, of the values": (both[1], grad_values),
        }
        for name, (mine, wanted) in found.items():
            assert mine.dtype == self.values.dtype, name
            assert torch.equal(mine, wanted), name


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


# Which kernels are taken.


@needs_numba
def test_numba_multiplies_float32_and_torch_the_rest() -> None:
    assert kernels.kernels_for(torch.float32) is kernels.numba_kernels()
    assert kernels.kernels_for(torch.float64) is torch_kernels
    with kernels.using("torch"):
        assert kernels.kernels_for(torch.float32) is torch_kernels
        with kernels.using("numba"):
            assert kernels.kernels_for(torch.float32) is kernels.numba_kernels()
            assert kernels.kernels_for(torch.float64) is torch_kernels
        assert kernels.kernels_for(torch.float32) is torch_kernels
    assert kernels.kernels_for(torch.float32) is kernels.numba_kernels()


def test_the_choice_of_kernels_ends_with_its_context() -> None:
    before = kernels.kernels_for(torch.float32)
    with pytest.raises(RuntimeError, match="on the way"), kernels.using("torch"):
        raise RuntimeError("on the way")
    assert kernels.kernels_for(torch.float32) is before
    wrong: Any = "mkl"
    with pytest.raises(ValueError, match=r"'mkl' are not one of best, torch, numba"):
        kernels.using(wrong).__enter__()
    assert kernels.kernels_for(torch.float32) is before


def test_without_numba_torch_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "numba_kernels", lambda: None)
    assert kernels.kernels_for(torch.float32) is torch_kernels
    layer = SparseLinear(6, 4, 0.5)
    layer(torch.ones(3, 6)).sum().backward()
    assert torch.allclose(layer(torch.eye(6)), layer.to_dense().t() + layer.bias)
    with (
        pytest.raises(ValueError, match=r"numba is not installed: pip install"),
        kernels.using("numba"),
    ):
        pass


# What the compiled kernels are made of.


@needs_numba
def test_vectors_of_several_widths_live_in_one_process() -> None:
    """One width after the other and back: a batch of 100 is three of them."""
    from numba import njit

    from sparsetrain.storage.csr import _simd as simd

    def sums(width: int) -> Any:
        @njit
        def run(a: Any, b: Any, indices: Any, out: Any) -> float:
            gathered = simd.gather(width, b, indices, 1)
            scaled = simd.fma(simd.splat(width, np.float32(3)), simd.load(width, a, 1), gathered)
            simd.store(out, 2, simd.add(scaled, gathered))
            return simd.total(scaled) + np.float32(1000) * simd.dot(gathered, scaled)

        return run

    def products(width: int) -> Any:
        @njit
        def run(a: Any, b: Any, indices: Any, out: Any) -> float:
            return simd.dot(simd.splat(width, np.float32(2)), simd.load(width, b, 0))

        return run

    a, b = np.arange(200, dtype=np.float32) % 7, np.arange(200, dtype=np.float32) % 5
    indices = np.arange(199, -1, -1).astype(np.int32)
    for make, width in itertools.product((sums, products), (4, 64, 1)):
        out = np.zeros(200, dtype=np.float32)
        found = make(width)(a, b, indices, out)
        if make is products:
            assert found == 2 * b[:width].sum()
            continue
        gathered = b[indices[1 : 1 + width]]
        scaled = 3 * a[1 : 1 + width] + gathered
        assert found == scaled.sum() + 1000 * (gathered * scaled).sum()
        assert (out[2 : 2 + width] == scaled + gathered).all()
        assert not out[:2].any() and not out[2 + width :].any()


@needs_numba
def test_tiles_cover_a_batch_once() -> None:
    module = kernels.numba_kernels()
    assert module is not None
    for batch in range(600):
        covered = 0
        for start, width in module.tiles(batch):
            assert start == covered
            assert width <= module.WIDEST and width & (width - 1) == 0
            covered += width
        assert covered == batch


def in_a_new_process(code: str, **environment: str) -> None:
    subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, check=True, timeout=300
    )


@pytest.mark.slow
@needs_numba
def test_a_machine_that_has_compiled_nothing_yet_trains_at_any_batch(tmp_path: Path) -> None:
    code = """
import torch
from sparsetrain.storage import SparseLinear
layer = SparseLinear(30, 20, 0.3)
for batch in (100, 1, 255, 64, 3):
    x = torch.ones(batch, 30, requires_grad=True)
    layer(x).sum().backward()
    layer(x.detach()).sum().backward()
    assert torch.allclose(layer(x), x @ layer.weight.t() + layer.bias, atol=1e-5), batch
"""
    in_a_new_process(code, NUMBA_CACHE_DIR=str(tmp_path))


@needs_numba
def test_torch_keeps_its_number_of_threads() -> None:
    """numba's own threads, once they start, would change it."""
    code = """
import torch
torch.set_num_threads(1)
from sparsetrain.storage import SparseLinear
SparseLinear(30, 20, 0.3)(torch.ones(2, 30)).sum().backward()
assert torch.get_num_threads() == 1, torch.get_num_threads()
"""
    in_a_new_process(code, NUMBA_NUM_THREADS="2")


@pytest.mark.parametrize(("choice", "dtype"), KERNELS)
def test_several_python_threads_multiply_at_once(choice: Any, dtype: torch.dtype) -> None:
    problems = [Problem(pattern_of("some", (60, 50), s), 20 + s, dtype, s) for s in range(8)]
    module = chosen(choice, dtype)
    with threads(2), ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda problem: problem.check(module), problems * 5))


# Layers: autograd against the dense twin.

INPUTS = {
    "rows": lambda g: torch.randn(7, 12, generator=g),
    "one": lambda g: torch.randn(12, generator=g),
    "none": lambda g: torch.randn(0, 12, generator=g),
    "sequences": lambda g: torch.randn(3, 5, 12, generator=g),
    "four": lambda g: torch.randn(2, 1, 3, 12, generator=g),
    "turned": lambda g: torch.randn(12, 7, generator=g).t(),
    "sliced": lambda g: torch.randn(14, 24, generator=g)[::2, 1::2],
    "expanded": lambda g: torch.randn(1, 12, generator=g).expand(7, 12),
    "permuted": lambda g: torch.randn(5, 12, 3, generator=g).permute(2, 0, 1),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", INPUTS)
@pytest.mark.parametrize(("choice", "dtype"), KERNELS)
def test_a_linear_layer_and_its_gradients(
    choice: Any, dtype: torch.dtype, layout: str, bias: bool
) -> None:
    mask = random_mask((9, 12), 0.3)
    mask[3] = False
    dense, sparse = pair(nn.Linear(12, 9, bias=bias, dtype=dtype), mask)
    generator = torch.Generator().manual_seed(0)
    x = INPUTS[layout](generator).to(dtype)
    inputs = [x.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2)]
    with kernels.using(choice):
        outs = [dense(inputs[0]), sparse(inputs[1])]
        # Not symmetric in any way, and not contiguous either.
        factor = torch.randn(*outs[0].shape, 2, generator=generator).to(dtype)[..., 0]
        for out in outs:
            (out * factor).square().sum().backward()
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0, "atol": 1e-12}
    assert outs[0].shape == outs[1].shape and outs[1].dtype == dtype
    assert torch.allclose(*outs, **close)
    assert inputs[1].grad.shape == x.shape and torch.allclose(
        inputs[0].grad, inputs[1].grad, **close
    )
    assert torch.allclose(dense.weight.grad[mask], sparse.values.grad, **close)
    if bias:
        assert torch.allclose(dense.bias.grad, sparse.bias.grad, **close)


@pytest.mark.parametrize(
    ("x_needs", "values_need", "bias_needs"), list(itertools.product([False, True], repeat=3))
)
@pytest.mark.parametrize(("choice", "dtype"), KERNELS)
def test_what_is_frozen_gets_no_gradient(
    choice: Any, dtype: torch.dtype, x_needs: bool, values_need: bool, bias_needs: bool
) -> None:
    dense, sparse = pair(nn.Linear(12, 9, dtype=dtype), random_mask((9, 12), 0.3))
    grads = []
    for layer in (dense, sparse):
        weight = layer.values if layer is sparse else layer.weight
        weight.requires_grad_(values_need)
        layer.bias.requires_grad_(bias_needs)
        x = torch.linspace(-1, 1, 60, dtype=dtype).view(5, 12).requires_grad_(x_needs)
        with kernels.using(choice):
            out = layer(x).square().sum()
        assert out.requires_grad == (x_needs or values_need or bias_needs)
        if out.requires_grad:
            out.backward()
        grads.append((x.grad, layer.bias.grad, weight.grad))
    for mine, wanted in zip(grads[1][:2], grads[0][:2], strict=True):
        assert (mine is None) == (wanted is None)
        assert mine is None or torch.allclose(mine, wanted, rtol=1e-5, atol=1e-5)
    values, weight = grads[1][2], grads[0][2]
    assert (values is None) == (weight is None) == (not values_need)
    if values is not None:
        assert torch.allclose(values, weight.view(-1)[sparse.pattern.flat()], rtol=1e-5, atol=1e-5)


def conv(*args: Any, **options: Any) -> dict[str, Any]:
    return {"args": args, **options}


CONVOLUTIONS = {
    "plain": conv(3, 5, 3),
    "padded": conv(3, 5, 3, padding=1),
    "strided": conv(3, 5, 3, stride=2),
    "dilated": conv(2, 4, 3, dilation=2),
    "everything": conv(2, 3, (2, 3), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
    "no_bias": conv(3, 5, 3, bias=False),
    "one": conv(4, 6, 1),
    "one_strided": conv(4, 6, 1, stride=(2, 3)),
    "one_padded": conv(4, 6, 1, padding=1),
    "one_channel": conv(1, 1, 2),
    "as_large_as_the_image": conv(2, 7, (6, 5)),
}


def convolution(name: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Any, Tensor]:
    options = dict(CONVOLUTIONS[name])
    layer = nn.Conv2d(*options.pop("args"), **options, dtype=dtype)
    mask = random_mask(tuple(layer.weight.shape), 0.4)
    dense, sparse = pair(layer, mask)
    assert isinstance(sparse, SparseConv2d)
    return dense, sparse, mask


@pytest.mark.parametrize("layout", ["batch", "unbatched", "one", "none", "channels_last", "view"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_and_its_gradients(name: str, layout: str) -> None:
    dense, sparse, mask = convolution(name)
    channels, generator = dense.in_channels, torch.Generator().manual_seed(0)
    number = {"one": 1, "none": 0}.get(layout, 4)
    x = torch.randn(number, channels, 6, 5, generator=generator).double()
    if layout == "unbatched":
        x = x[0]
    elif layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "view":
        x = torch.randn(channels, 4, 5, 12, generator=generator).double()[..., ::2]
        x = x.permute(1, 0, 3, 2)
    inputs = [x.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2)]
    outs = [dense(inputs[0]), sparse(inputs[1])]
    assert outs[0].shape == outs[1].shape
    assert torch.allclose(*outs, rtol=0, atol=1e-12)
    factor = torch.randn(outs[0].shape, generator=generator).double()
    for out in outs:
        (out * factor).square().sum().backward()
    assert torch.allclose(inputs[0].grad, inputs[1].grad, rtol=0, atol=1e-11)
    assert torch.allclose(dense.weight.grad[mask], sparse.values.grad, rtol=0, atol=1e-11)
    if dense.bias is not None:
        assert torch.allclose(dense.bias.grad, sparse.bias.grad, rtol=0, atol=1e-11)


@needs_numba
@pytest.mark.parametrize("name", ["padded", "one", "everything"])
def test_a_convolution_in_float32(name: str) -> None:
    dense, sparse, mask = convolution(name, torch.float32)
    x = torch.randn(3, dense.in_channels, 6, 5)
    for layer in (dense, sparse):
        layer(x).square().sum().backward()
    assert torch.allclose(dense(x), sparse(x), rtol=1e-5, atol=1e-5)
    assert torch.allclose(dense.weight.grad[mask], sparse.values.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 6), (3, 6), (9, 6), (2, 2, 6)])
def test_gradients_of_a_linear_layer_by_differences(shape: tuple[int, ...], bias: bool) -> None:
    layer = SparseLinear(6, 4, 0.4, bias=bias, dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, values: Tensor, *bias: Tensor) -> Tensor:
        inputs = {"values": values} | ({"bias": bias[0]} if bias else {})
        result: Tensor = torch.func.functional_call(layer, inputs, (x,))
        return result

    assert torch.autograd.gradcheck(run, (x, *layer.parameters()))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_gradients_of_a_convolution_by_differences(name: str) -> None:
    _, sparse, _ = convolution(name)
    for shape in ((2, sparse.in_channels, 6, 5), (sparse.in_channels, 6, 5)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

        def run(x: Tensor, values: Tensor, *bias: Tensor) -> Tensor:
            inputs = {"values": values} | ({"bias": bias[0]} if bias else {})
            result: Tensor = torch.func.functional_call(sparse, inputs, (x,))
            return result

        assert torch.autograd.gradcheck(run, (x, *sparse.parameters()), fast_mode=True)


def test_a_layer_used_twice_in_one_graph_adds_its_gradients() -> None:
    dense, sparse = pair(nn.Linear(6, 6, dtype=torch.float64), random_mask((6, 6), 0.4))
    for layer in (dense, sparse):
        x = torch.ones(2, 6, dtype=torch.float64)
        (layer(torch.tanh(layer(x))) + layer(2 * x)).square().sum().backward()
    assert torch.allclose(dense.weight.grad.view(-1)[sparse.pattern.flat()], sparse.values.grad)
    assert torch.allclose(dense.bias.grad, sparse.bias.grad)


def test_a_graph_can_be_walked_twice() -> None:
    layer = SparseLinear(6, 4, 0.5, dtype=torch.float64)
    loss = layer(torch.ones(2, 6, dtype=torch.float64)).square().sum()
    loss.backward(retain_graph=True)
    once = layer.values.grad.clone()
    loss.backward()
    assert torch.equal(layer.values.grad, 2 * once)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_recorded(mode: Any) -> None:
    layer = SparseLinear(6, 4, 0.5)
    layer.tape = Tape()
    x = torch.ones(3, 6)
    with mode():
        out = layer(x)
    assert not out.requires_grad
    assert torch.equal(out.clone(), layer(x))
    assert layer.tape.factors == []
    layer(x).sum().backward()  # nothing of that mode is left behind
    assert len(layer.tape.factors) == 1


def test_gradients_of_gradients_are_refused() -> None:
    layer = SparseLinear(6, 4, 0.5, dtype=torch.float64)
    x = torch.ones(3, 6, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def test_results_may_be_changed_in_place() -> None:
    """As `nn.ReLU(inplace=True)` does behind every layer of many networks."""
    dense, sparse = pair(nn.Linear(6, 4, dtype=torch.float64), random_mask((4, 6), 0.5))
    x = torch.linspace(-1, 1, 18, dtype=torch.float64).view(3, 6)
    for layer in (dense, sparse):
        F.relu_(layer(x)).square().sum().backward()
    assert torch.allclose(dense.weight.grad.view(-1)[sparse.pattern.flat()], sparse.values.grad)


def test_results_of_a_convolution_may_be_changed_in_place() -> None:
    dense, sparse, mask = convolution("padded")
    x = torch.linspace(-1, 1, 4 * 3 * 30, dtype=torch.float64).view(4, 3, 6, 5)
    for layer in (dense, sparse):
        F.relu_(layer(x)).square().sum().backward()
    assert torch.allclose(dense.weight.grad[mask], sparse.values.grad)


def test_an_input_that_was_overwritten_before_the_backward_pass_is_noticed() -> None:
    layer = SparseLinear(6, 4, 0.5)
    for x in (torch.ones(1, 6), torch.ones(6, 3).t(), torch.ones(3, 6)):
        out = layer(x).sum()
        x.zero_()
        layer.values.grad = None
        try:
            out.backward()
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
        else:  # it had made a copy
            assert layer.values.grad.all()


# Code that was written for dense layers.


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6)])
def test_the_result_of_a_linear_layer_can_be_viewed_as_that_of_a_dense_one(
    shape: tuple[int, ...],
) -> None:
    layer = SparseLinear(6, 4, 0.5)
    out = layer(torch.ones(shape))
    assert torch.equal(out.view(shape[0], -1), out.flatten(1))
    if len(shape) > 2:  # that of a matrix stays feature-major, whose columns come first
        assert torch.equal(F.relu(out).view(-1), F.relu(out).flatten())


def test_the_result_of_a_convolution_can_be_viewed_as_that_of_a_dense_one() -> None:
    _, sparse, _ = convolution("plain", torch.float32)
    out = F.relu(sparse(torch.ones(4, 3, 6, 5)))
    assert torch.equal(out.view(out.size(0), -1), out.flatten(1))


@pytest.mark.parametrize("batch", [0, 1, 5, 40])
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_is_not_that_of_the_layer(default: torch.dtype, batch: int) -> None:
    layer, x = SparseLinear(30, 20, 0.3, dtype=torch.float32), torch.ones(batch, 30)
    grads = []
    for setting in (torch.float32, default):
        torch.set_default_dtype(setting)
        try:
            inputs = x.clone().requires_grad_()
            out = layer(inputs)
            out.sum().backward()
        finally:
            torch.set_default_dtype(torch.float32)
        grads.append((out.detach(), inputs.grad, layer.values.grad.clone()))
        layer.zero_grad()
    for mine, wanted in zip(*grads, strict=True):
        assert mine.dtype == torch.float32 and torch.equal(mine, wanted)


def test_other_float_inputs_are_cast_and_get_their_gradients_back() -> None:
    dense, sparse = pair(nn.Linear(12, 9), random_mask((9, 12), 0.3))
    for dtype in (torch.float64, torch.bfloat16):
        x = torch.linspace(-1, 1, 60).view(5, 12).to(dtype).requires_grad_()
        out = sparse(x)
        assert out.dtype == torch.float32
        assert torch.allclose(out, dense(x.detach().float()), atol=1e-6)
        out.sum().backward()
        assert x.grad.dtype == dtype


@pytest.mark.parametrize("batch", [1, 5, 40])
@pytest.mark.parametrize(("choice", "dtype"), KERNELS)
def test_within_autocast(choice: Any, dtype: torch.dtype, batch: int) -> None:
    """Also in the backward pass, should it run there."""
    dense, sparse = pair(nn.Linear(12, 9, dtype=dtype), random_mask((9, 12), 0.3))
    x = torch.linspace(-1, 1, 12 * batch, dtype=dtype).view(batch, 12).requires_grad_()
    at = sparse.pattern.flat()
    dense(x).square().sum().backward()
    for inside in (False, True):
        x.grad = sparse.values.grad = None
        with kernels.using(choice), torch.autocast("cpu", torch.bfloat16):
            out = sparse(x)
            if inside:
                out.square().sum().backward()
        if not inside:
            with kernels.using(choice):
                out.to(dtype).square().sum().backward()
        assert sparse.values.grad.dtype == x.grad.dtype == dtype
        wanted = dense.weight.grad.view(-1)[at]
        assert torch.allclose(sparse.values.grad, wanted, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [2, 40])
def test_a_layer_that_was_moved_to_a_dtype_without_products_says_so(
    dtype: torch.dtype, batch: int
) -> None:
    layer = SparseLinear(12, 9, 0.3).to(dtype)
    with pytest.raises(ValueError, match=str(dtype).removeprefix("torch.")):
        layer(torch.ones(batch, 12, dtype=dtype)).sum().backward()


def test_a_layer_may_move_to_float64_and_back() -> None:
    layer, x = SparseLinear(12, 9, 0.3), torch.ones(3, 12)
    before, values = layer(x).detach(), layer.values
    layer.double()
    assert layer(x.double()).dtype == torch.float64
    layer.float()
    assert layer.values is values
    assert torch.equal(layer(x), before)


def test_values_and_bias_of_two_dtypes_are_refused() -> None:
    layer = SparseLinear(12, 9, 0.3)
    layer.bias.data = layer.bias.data.double()
    with pytest.raises(ValueError, match=r"bias is torch.float64 and the values are torch.float32"):
        layer(torch.ones(3, 12))


def test_other_devices_are_refused() -> None:
    layer = SparseLinear(12, 9, 0.3)
    with pytest.raises(ValueError, match=r"csr storage computes on the CPU"):
        layer(torch.ones(3, 12, device="meta"))
    with pytest.raises(ValueError, match=r"csr storage computes on the CPU"):
        layer.to("meta")(torch.ones(3, 12))


@pytest.mark.parametrize("shape", [(3, 11), (3, 24), (12, 3), (6,)])
def test_inputs_of_another_width_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        SparseLinear(12, 9, 0.3)(torch.ones(shape))


@pytest.mark.parametrize(
    "shape", [(2, 6, 6, 5), (2, 2, 6, 5), (2, 3, 2, 5), (3, 6), (1, 2, 3, 4, 5)]
)
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    dense, sparse, _ = convolution("plain", torch.float32)
    for layer in (dense, sparse):
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            layer(torch.ones(shape))


@pytest.mark.filterwarnings("ignore")  # of what Dynamo does on its way
def test_a_compiled_layer_computes_the_same() -> None:
    layer = nn.Sequential(SparseLinear(12, 9, 0.3), nn.ReLU())
    x = torch.linspace(-1, 1, 60).view(5, 12)
    out = torch.compile(layer, backend="eager")(x)
    assert torch.equal(out, layer(x))
    out.sum().backward()
    assert layer[0].values.grad.any()


def test_sparsify_keeps_the_layout_of_features() -> None:
    """Flattened filters are in the order in which patches are unfolded."""
    layer = nn.Conv2d(2, 1, (2, 3), bias=False)
    mask = torch.zeros(1, 2, 2, 3, dtype=torch.bool)
    mask[0, 1, 0, 2] = True
    sparse = sparsify(layer, mask)
    with torch.no_grad():
        sparse.values.fill_(1.0)
    x = torch.arange(2.0 * 5 * 5).view(1, 2, 5, 5)
    assert torch.equal(sparse(x)[0, 0], x[0, 1, :4, 2:])
