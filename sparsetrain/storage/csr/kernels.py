"""Which kernels multiply: numba's where they can, torch's own otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Literal

import torch

from sparsetrain.storage.csr import torch_kernels

Choice = Literal["best", "torch", "numba"]

_choice: Choice = "best"


@cache
def numba_kernels() -> ModuleType | None:
    """The kernels in numba, or None where numba is not installed (`pip install .[fast]`)."""
    try:
        from sparsetrain.storage.csr import numba_products
    except ImportError:
        return None
    return numba_products


def kernels_for(dtype: torch.dtype) -> ModuleType:
    """The module whose functions multiply matrices of this dtype.

    The choice follows reference_runs/speed/truly_sparse.py, tables "inference" and
    "kernels". What decides is the batch, hardly the shape or the density:

    | | float32 with numba | otherwise |
    |---|---|---|
    | product, batch 1 | numba, inputs gathered by 16 | MKL's CSR product |
    | product, batch 2 to 15 | MKL's CSR product | MKL's CSR product |
    | product, multiples of 16 | numba, tiles of the batch | FBGEMM's embedding bag |
    | product, other batches | FBGEMM's embedding bag | FBGEMM's embedding bag |
    | gradient of the values | numba | `sampled_addmm` |
    | both gradients | numba, one walk (two for a batch of 1) | the two above |
    """
    if _choice != "torch" and dtype == torch.float32:
        found = numba_kernels()
        if found is not None:
            return found
    return torch_kernels


@contextmanager
def using(choice: Choice) -> Iterator[None]:
    """Within this context take these kernels, for comparisons.

    Raises:
        ValueError: numba is asked for and not installed, or the name is unknown.
    """
    global _choice
    if choice not in ("best", "torch", "numba"):
        raise ValueError(f"kernels {choice!r} are not one of best, torch, numba")
    if choice == "numba" and numba_kernels() is None:
        raise ValueError("numba is not installed: pip install 'sparsetrain[fast]'")
    before, _choice = _choice, choice
    try:
        yield
    finally:
        _choice = before
