"""Choosing without replacement from more places than anyone wants to list."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def random_ranks(population: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """`count` distinct integers below `population`, uniformly at random, ascending (int64)."""
    if count > population:
        raise ValueError(f"cannot choose {count} of {population} connections")
    if 4 * count >= population:
        return torch.randperm(population, generator=generator)[:count].sort().values
    draws = np.empty(0, dtype=np.int64)
    while True:  # more than 3/4 of the draws are new, so this ends after a round or two
        more = torch.randint(population, (count + count // 8 + 16,), generator=generator)
        draws = np.concatenate([draws, more.numpy()])
        values, first = np.unique(draws, return_index=True)
        if values.size >= count:
            chosen = values[np.argsort(first, kind="stable")[:count]]
            return torch.from_numpy(np.sort(chosen))
