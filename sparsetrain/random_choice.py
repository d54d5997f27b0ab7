"""Choosing without replacement from more places than anyone wants to list."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparsetrain._lookup import places
from sparsetrain.part import Part


def random_ranks(population: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """`count` distinct integers below `population`, uniformly at random, ascending (int64)."""
    if count > population:
        raise ValueError(f"cannot choose {count} of {population} connections")
    if 4 * count >= population:
        return torch.randperm(population, generator=generator)[:count].sort().values
    draws = np.empty(0, dtype=np.int64)
    length = count  # of the draws that are looked at; repetitions make it longer
    while True:
        if length > draws.size:  # more than 3/4 are new, so this happens once or twice
            more = torch.randint(population, (count + count // 8 + 16,), generator=generator)
            draws = np.concatenate([draws, more.numpy()])
        length = min(length, draws.size)
        ordered = np.sort(draws[:length])
        is_new = np.ones(length, dtype=np.bool_)
        np.not_equal(ordered[1:], ordered[:-1], out=is_new[1:])
        missing = count - int(np.count_nonzero(is_new))
        if missing == 0:
            return torch.from_numpy(ordered[is_new])
        length += missing


def random_free(part: Part, kept: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` flat indices of a weight, uniformly at random among those not in `kept`.

    Every rank draws the same numbers and takes those that fall into its part.

    Args:
        part: of the weight that is here.
        kept: of the part, ascending.
        generator: CPU random source.

    Returns:
        Those of the indices that are here, ascending.
    """
    free_here = part.held_numel - kept.numel()
    first, free = part.place(free_here)
    ranks = random_ranks(free, count, generator)
    if not part.is_whole:
        ranks = ranks[(ranks >= first) & (ranks < first + free_here)] - first
    ranks = ranks.to(kept.device)
    # The r-th free index is r plus the number of kept indices before it.
    before = kept - torch.arange(kept.numel(), device=kept.device)
    return ranks + places(before, ranks + 1)
