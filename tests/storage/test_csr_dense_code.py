"""Code that was written for dense layers runs with sparse ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from csr_problems import (
    KERNELS,
    convolution,
    fresh_memory_is_nan,  # noqa: F401 - a fixture
)
from sparse_twins import pair, random_mask
from torch import nn
from torch.nn import functional as F

from sparsetrain.storage.csr import kernels
from sparsetrain.storage.csr.convert import sparsify
from sparsetrain.storage.csr.layers import SparseLinear


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
