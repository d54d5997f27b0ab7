"""Which kernels are taken, and what the compiled ones are made of."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from csr_problems import (
    KERNELS,
    Problem,
    chosen,
    fresh_memory_is_nan,  # noqa: F401 - a fixture
    needs_numba,
    pattern_of,
    threads,
)

from sparsetrain.storage.csr import kernels, torch_kernels
from sparsetrain.storage.csr.layers import SparseLinear


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
