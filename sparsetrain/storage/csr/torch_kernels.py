"""The products of a sparse layer with what torch brings along: any float dtype, any batch.

All matrices are feature-major: x [features, batch].
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsetrain.storage.csr.pattern import Pattern

# Below this batch MKL's product of a CSR matrix is faster than FBGEMM's embedding bag.
_BAG_FROM = 16

with warnings.catch_warnings():  # torch calls its CSR tensors a beta feature, once a process
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64), [], (1, 1))


def transposed(x: Tensor) -> Tensor:
    """[rows, columns] -> [columns, rows], both contiguous."""
    return x.t().contiguous()


def product(pattern: Pattern, values: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """W x + bias: [columns, batch] -> [rows, batch]."""
    out = _times(pattern.pointers, pattern.columns, values, pattern.shape, x)
    return out if bias is None else out.add_(bias.unsqueeze(1))


def input_gradient(pattern: Pattern, values: Tensor, grad: Tensor) -> Tensor:
    """W^T grad: [rows, batch] -> [columns, batch]."""
    turned = pattern.transposed()
    shape = (pattern.shape[1], pattern.shape[0])
    return _times(turned.pointers, turned.rows, values[turned.order], shape, grad)


def values_gradient(pattern: Pattern, x: Tensor, grad: Tensor) -> Tensor:
    """grad x^T at the non-zeros: [nnz]."""
    zeros = torch.zeros(pattern.nnz, dtype=x.dtype)
    at = torch.sparse_csr_tensor(pattern.pointers, pattern.columns, zeros, pattern.shape)
    sampled: Tensor = torch.sparse.sampled_addmm(at, grad, x.t(), beta=0.0)
    return sampled.values()


def gradients(pattern: Pattern, values: Tensor, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Both gradients: of the input and of the values."""
    return input_gradient(pattern, values, grad), values_gradient(pattern, x, grad)


def _times(
    pointers: Tensor, indices: Tensor, values: Tensor, shape: tuple[int, int], x: Tensor
) -> Tensor:
    if x.shape[1] < _BAG_FROM:
        with torch.autocast("cpu", enabled=False):
            return torch.sparse_csr_tensor(pointers, indices, values, shape) @ x
    return F.embedding_bag(indices, x, pointers[:-1], per_sample_weights=values, mode="sum")
