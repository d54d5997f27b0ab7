"""The product of a sparse weight and a dense batch, for autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsetrain.storage.csr.kernels import kernels_for
from sparsetrain.storage.csr.pattern import Pattern
from sparsetrain.storage.csr.tape import Tape


def _feature_major(x: Tensor, kernels: Any) -> Tensor:
    """[batch, features] -> [features, batch], contiguous; without a copy where it is so already."""
    if x.t().is_contiguous():
        return x.t()
    turned: Tensor = kernels.transposed(x.contiguous())
    return turned


def multiply(
    x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern, tape: Tape | None
) -> Tensor:
    """W x^T + b: [batch, in] -> [out, batch], with a gradient where one is asked for."""
    if torch.is_grad_enabled():
        product: Tensor = SparseProduct.apply(x, values, bias, pattern, tape)  # type: ignore[no-untyped-call]
    else:
        kernels = kernels_for(values.dtype)
        product = kernels.product(pattern, values, _feature_major(x, kernels), bias)
    return product


class SparseProduct(torch.autograd.Function):
    """y = W x^T + b for a CSR weight W: [batch, in] -> [out, batch], feature-major.

    Seen as [batch, out] the result keeps its layout through element-wise functions, so a network of
    sparse layers transposes its input once. Gradients of gradients are not supported.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        pattern: Pattern,
        tape: Tape | None,
    ) -> Tensor:
        kernels = kernels_for(values.dtype)
        features = _feature_major(x, kernels)
        ctx.save_for_backward(features, values)
        ctx.pattern, ctx.tape = pattern, tape
        out: Tensor = kernels.product(pattern, values, features, bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        features, values = ctx.saved_tensors
        wants_x, wants_values, wants_bias = ctx.needs_input_grad[:3]
        kernels = kernels_for(values.dtype)
        grad = _feature_major(grad.t(), kernels)
        grad_x = grad_values = grad_bias = None
        if wants_x and wants_values:
            grad_x, grad_values = kernels.gradients(ctx.pattern, values, features, grad)
        elif wants_values:
            grad_values = kernels.values_gradient(ctx.pattern, features, grad)
        elif wants_x:
            grad_x = kernels.input_gradient(ctx.pattern, values, grad)
        if wants_bias:
            grad_bias = grad.sum(1)
        if ctx.tape is not None and wants_values:
            ctx.tape.add(features, grad)
        return None if grad_x is None else grad_x.t(), grad_values, grad_bias, None, None
