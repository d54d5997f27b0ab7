"""What tests of sparse layers share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparsetrain.storage.csr.layers import SparseLinear


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(density: float = 0.3, **options: Any) -> SparseLinear:
    return SparseLinear(12, 9, density, generator=seeded(), **options)


def image_layer(**options: Any) -> nn.Conv2d:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Conv2d(3, 4, 3, **options)


def state_of(module: nn.Module) -> dict[str, Any]:
    """Everything a module holds, for a comparison of before and after."""
    return {
        "class": type(module),
        "parameters": [(name, id(p), p.clone()) for name, p in module.named_parameters()],
        "attributes": sorted(module.__dict__),
    }
