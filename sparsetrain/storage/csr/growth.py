"""Finding the largest entries of a matrix that is computed a block of rows at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparsetrain._comparable import check_count, check_finite
from sparsetrain.selection import above, top_k_indices

#: Entries of a block: 16 MiB of float32, small beside the network and large enough for the product.
_BLOCK = 1 << 22


def largest_in_blocks(
    rows: Callable[[int, int], Tensor],
    shape: tuple[int, int],
    count: int,
    taken: Tensor,
    name: str,
) -> Tensor:
    """Flat indices, ascending, of the `count` largest |entries| outside of `taken`.

    Args:
        rows: (start, stop) -> those rows of the matrix, [stop - start, columns].
        shape: (rows, columns) of the matrix.
        taken: flat indices that may not be chosen, ascending.
        name: layer named in errors.

    Returns:
        int64. Of equal entries the one at the lower index is chosen.

    Raises:
        ValueError: an entry outside of `taken` is NaN or infinite, or there are too few.
    """
    height, width = shape
    check_count(count, height * width - taken.numel(), name)
    step = max(1, _BLOCK // width)
    best = torch.empty(0)
    where = torch.empty(0, dtype=torch.int64)
    for start in range(0, height, step):
        stop = min(start + step, height)
        block = rows(start, stop).abs_().view(-1)
        low, high = torch.searchsorted(taken, torch.tensor([start * width, stop * width]))
        block[taken[low:high] - start * width] = -1.0
        check_finite(block, name)
        if best.numel() < count:
            free = block.numel() - int(high - low)
            found = top_k_indices(block, min(count, free), name=name)
        else:
            # Ties go to the lower index: a later entry has to be larger than the last of the best.
            found = above(block, best.min()) if count else where
        best = torch.cat([best.to(block), block[found]])
        where = torch.cat([where, found + start * width])
        if best.numel() > count:
            chosen = top_k_indices(best, count, name=name)
            best, where = best[chosen], where[chosen]
    return where
