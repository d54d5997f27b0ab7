"""Gradients of sparse layers against their dense twins."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from csr_problems import (
    CONVOLUTIONS,
    KERNELS,
    convolution,
    fresh_memory_is_nan,  # noqa: F401 - a fixture
    needs_numba,
)
from sparse_twins import pair, random_mask
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrain.storage.csr import kernels
from sparsetrain.storage.csr.layers import SparseLinear
from sparsetrain.storage.csr.product import Tape

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
