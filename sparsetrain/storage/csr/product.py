"""The product of a sparse weight and a dense batch, for autograd."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsetrain.storage.csr.kernels import kernels_for
from sparsetrain.storage.csr.pattern import Pattern


@dataclass
class Tape:
    """The two factors of a weight's dense gradient, kept while somebody wants it.

    The dense gradient is the sum of grad x^T over the backward passes since `zero_grad`; it is
    asked for in blocks, so it never exists as a whole.
    """

    factors: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _pass: int = -1

    def add(self, x: Tensor, grad: Tensor, accumulated: Tensor | None) -> None:
        """Take the factors of one backward pass: x [in, batch] and grad [out, batch].

        Args:
            accumulated: what the values' gradient holds before this pass. None or zeros say that
                `zero_grad` was called since the pass before.
        """
        # Several calls of one layer in one backward pass belong together.
        this_pass = torch._C._current_graph_task_id()
        is_another = this_pass != self._pass
        if is_another and (accumulated is None or not accumulated.any()):
            self.factors.clear()
        self._pass = this_pass
        self.factors.append((x, grad))

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of the dense gradient: [stop - start, in]."""
        x, grad = self.factors[0]
        total = grad[start:stop] @ x.t()
        for x, grad in self.factors[1:]:
            total.addmm_(grad[start:stop], x.t())
        return total


def _feature_major(x: Tensor, kernels: Any) -> Tensor:
    """[batch, features] -> [features, batch], contiguous; without a copy where it is so already."""
    if x.t().is_contiguous():
        return x.t()
    turned: Tensor = kernels.transposed(x.contiguous())
    return turned


class SparseProduct(torch.autograd.Function):
    """y = x W^T + b for a CSR weight W: [batch, in] -> [batch, out].

    Inside, everything is feature-major, and so is the result: [out, batch] seen as [batch, out].
    Element-wise functions keep that layout, so a network of sparse layers transposes its input
    once. Gradients of gradients are not supported.
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
        return out.t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        features, values = ctx.saved_tensors
        wants_x, wants_values, wants_bias = ctx.needs_input_grad[:3]
        kernels = kernels_for(values.dtype)
        grad = _feature_major(grad, kernels)
        grad_x = grad_values = grad_bias = None
        if wants_x and wants_values:
            grad_x, grad_values = kernels.gradients(ctx.pattern, values, features, grad)
        elif wants_values:
            grad_values = kernels.values_gradient(ctx.pattern, features, grad)
        elif wants_x:
            grad_x = kernels.input_gradient(ctx.pattern, values, grad)
        if wants_bias:
            grad_bias = grad.sum(1)
        if ctx.tape is not None:
            ctx.tape.add(features, grad, values.grad)
        return None if grad_x is None else grad_x.t(), grad_values, grad_bias, None, None
