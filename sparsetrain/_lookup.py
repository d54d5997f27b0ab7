"""Finding sorted numbers among sorted numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain.storage.csr.kernels import numba_kernels

# Below this the start of a parallel loop costs more than it saves.
_MANY = 1 << 13


def places(ordered: Tensor, queries: Tensor) -> Tensor:
    """Where each query would be inserted, before equal numbers, as `torch.searchsorted` says.

    Args:
        ordered, queries: int64, ascending both; then one walk over the two finds all places.
    """
    kernels = numba_kernels() if queries.numel() > _MANY and queries.is_cpu else None
    if kernels is None:
        return torch.searchsorted(ordered, queries)
    found: Tensor = kernels.places(ordered, queries)
    return found


def without(indices: Tensor, removed: Tensor) -> Tensor:
    """`indices` less `removed`; both ascending, the second among the first."""
    keep = torch.ones(indices.numel(), dtype=torch.bool, device=indices.device)
    keep[places(indices, removed)] = False
    return indices[keep]
