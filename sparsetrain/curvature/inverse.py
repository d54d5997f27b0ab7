"""Inverse Fisher blocks, for optimal brain surgeon (Hassibi & Stork 1993)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

#: Numbers of the blocks that are inverted at a time, in float64.
_CHUNK = 1 << 22


def inverse_fisher_blocks(gradients: Tensor, block: int, *, damping: float = 1e-5) -> Tensor:
    """The inverses of the diagonal blocks of damping I + 1/m sum of g g'.

    The matrix of Singh & Alistarh 2020, "WoodFisher", eq. 6. They find it by a rank-one recursion
    that goes through all blocks for each gradient; here sums are inverted, in float64.

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
    blocks = FisherBlocks(block)
    blocks.add(gradients)
    return blocks.inverse(damping)


class FisherBlocks:
    """Sums of g g' in diagonal blocks, some gradients at a time.

    Args:
        block: weights in a block, consecutive.
    """

    def __init__(self, block: int) -> None:
        if block < 1:
            raise ValueError(f"block={block} must be 1 or more")
        self.block = block
        self.rows = 0
        self._sums: Tensor | None = None

    def add(self, gradients: Tensor) -> None:
        """Add gradients, [m, weights].

        Raises:
            ValueError: one is not finite.
        """
        if not gradients.isfinite().all():
            raise ValueError("a gradient is NaN or infinite: look for bad inputs")
        by_block = in_blocks(gradients, self.block).transpose(0, 1)
        product = by_block.transpose(1, 2) @ by_block
        self._sums = product if self._sums is None else self._sums.add_(product)
        self.rows += len(gradients)

    def inverse(self, damping: float) -> Tensor:
        """The inverses of damping I + the mean of g g', [blocks, block, block].

        Raises:
            ValueError: damping is not above 0, or there is no gradient.
        """
        if damping <= 0:
            raise ValueError(f"damping={damping} must be above 0")
        if self._sums is None:
            raise ValueError("there is no gradient yet: add some first")
        step = max(_CHUNK // self.block**2, 1)
        parts = []
        for start in range(0, len(self._sums), step):
            sums = self._sums[start : start + step]
            matrix = sums.double().div_(self.rows)
            matrix.diagonal(dim1=1, dim2=2).add_(damping)
            root = torch.linalg.cholesky(matrix)
            parts.append(torch.cholesky_inverse(root).to(sums.dtype))
        return torch.cat(parts)


def in_blocks(values: Tensor, block: int) -> Tensor:
    """[..., weights] as [..., blocks, block], filled up with zeros."""
    missing = -values.shape[-1] % block
    return F.pad(values, (0, missing)).reshape(*values.shape[:-1], -1, block)
