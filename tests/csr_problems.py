"""What tests of sparse products share: kernels, cases and their dense twins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from sparse_twins import pair, random_mask
from torch import Tensor, nn

from sparsetrain.storage.csr import kernels
from sparsetrain.storage.csr.layers import SparseConv2d
from sparsetrain.storage.csr.pattern import Pattern

HAS_NUMBA = kernels.numba_kernels() is not None


needs_numba = pytest.mark.skipif(not HAS_NUMBA, reason="numba is not installed")


KERNELS = [
    pytest.param("torch", torch.float64, id="torch64"),
    pytest.param("torch", torch.float32, id="torch32"),
    pytest.param("numba", torch.float32, id="numba32", marks=needs_numba),
]


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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


@pytest.fixture(autouse=True)
def fresh_memory_is_nan() -> Iterator[None]:
    """What a kernel forgets to write is NaN, and not by chance the right number."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    module = kernels.numba_kernels()
    with pytest.MonkeyPatch.context() as patch:
        if hasattr(module, "_new"):  # numpy's arrays are not filled by torch
            patch.setattr(module, "_new", lambda *shape: np.full(shape, np.nan, np.float32))
        yield
    torch.use_deterministic_algorithms(False)
