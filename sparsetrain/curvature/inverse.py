"""Inverse Fisher blocks, for optimal brain surgeon (Hassibi & Stork 1993)."""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_fisher_blocks(gradients: Tensor, block: int, *, damping: float = 1e-5) -> Tensor:
    """The inverses of the diagonal blocks of damping I + 1/m sum of g g'.

    By the rank-one recursion of Singh & Alistarh 2020, "WoodFisher", eq. 6 (Sherman-Morrison):
    F <- F - (F g)(F g)' / (m + g' F g), beginning with I / damping.

    Args:
        gradients: [m, weights], one row a sample or mini-batch.
        block: weights in a block, consecutive; the last block is filled up with zeros, whose
            inverse is 1 / damping.
        damping: above 0; added to the diagonal.

    Returns:
        [blocks, block, block]

    Raises:
        ValueError: gradients that are not finite, or a size out of range.
    """
    if gradients.dim() != 2 or not len(gradients):
        raise ValueError(
            f"gradients must be [samples, weights], not of shape {tuple(gradients.shape)}"
        )
    if block < 1 or damping <= 0:
        raise ValueError(f"block={block} must be 1 or more, and damping={damping} above 0")
    if not gradients.isfinite().all():
        raise ValueError("a gradient is NaN or infinite: look for bad inputs")
    samples, weights = gradients.shape
    blocks = -(-weights // block)
    padded = torch.nn.functional.pad(gradients, (0, blocks * block - weights))
    rows = padded.view(samples, blocks, block)
    inverse = torch.eye(block, dtype=rows.dtype, device=rows.device).div(damping)
    inverse = inverse.repeat(blocks, 1, 1)
    for row in rows:
        vector = (inverse @ row.unsqueeze(2)).squeeze(2)
        divisor = samples + (vector * row).sum(1)
        inverse.baddbmm_(
            vector.unsqueeze(2), (vector / divisor.unsqueeze(1)).unsqueeze(1), alpha=-1
        )
    return inverse
