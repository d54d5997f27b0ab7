"""SparseGPT's arithmetic on one weight matrix: which weights go, and what the others become."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain.selection import n_m_mask, top_k
from sparsetrain.structures import NM

#: Columns among which each error is spread at once; what lies to their right gets the errors of
#: all of them by one matrix product. So few columns stay in the cache.
_NARROW = 16


def inverse_root(hessian: Tensor, damping: float, *, name: str) -> Tensor:
    """The upper triangular U with U' U = (H + damping mean(diag H) I)^-1.

    One Cholesky step of the matrix turned round and one triangular inverse, in place of two
    Cholesky steps and an inverse. Inputs that were always 0 get a diagonal of 1.

    Args:
        hessian: [inputs, inputs], the mean of x x'; not changed.
        damping: share of the mean of the diagonal that is added to it.
        name: of the layer, for errors.

    Raises:
        ValueError: the matrix is not positive definite even with ten and a hundred times the
            damping.
    """
    turned = hessian.flip(0, 1)
    diagonal = turned.diagonal()
    diagonal[diagonal == 0] = 1.0
    mean = float(diagonal.mean())
    for factor in (1.0, 10.0, 100.0):
        damped = turned.clone()
        damped.diagonal().add_(factor * damping * mean)
        root, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            identity = torch.eye(len(root), dtype=root.dtype, device=root.device)
            inverse: Tensor = torch.linalg.solve_triangular(root, identity, upper=False)
            return inverse.flip(0, 1)
    raise ValueError(
        f"the inputs of {name} have a Hessian that is not positive definite, even with a damping "
        f"of {100 * damping:g}: give more calibration samples or a larger damping"
    )


def surgery(
    weight: Tensor,
    root: Tensor,
    keep: int | NM,
    *,
    name: str,
    dead: Tensor | None = None,
    block: int = 128,
) -> tuple[Tensor, Tensor]:
    """Prune a matrix column by column, each error spread over the columns to its right.

    Frantar & Alistarh 2023, "SparseGPT", algorithm 1. The mask of a block of columns is chosen when
    it is reached, by w^2 / U_jj^2 over all its rows; for n:m in each group of a row.

    Args:
        weight: [outputs, inputs]; not changed.
        root: U of `inverse_root`.
        keep: weights to keep in all, shared out over the blocks as evenly as it goes; or n:m.
        dead: bool [inputs], inputs that were always 0; their weights are worth nothing.
        block: columns; whole groups of n:m are taken.

    Returns:
        The new weight, 0 where pruned, and its mask.
    """
    work = weight.clone()
    if dead is not None:
        work[:, dead] = 0.0
    mask = torch.zeros_like(work, dtype=torch.bool)
    columns = work.shape[1]
    if isinstance(keep, NM):
        block = _whole_groups(block, keep)
    left = keep
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        part, triangle = work[:, start:stop], root[start:stop, start:stop]
        chosen: Tensor | NM
        if isinstance(left, NM):
            chosen = left
        else:
            share = round(left * (stop - start) / (columns - start))
            chosen = top_k((part / triangle.diagonal()).square(), share, name=name)
            left -= share
        errors, mask[:, start:stop] = _block(part, triangle, chosen, name)
        work[:, stop:].addmm_(errors, root[start:stop, stop:], alpha=-1)
    return work, mask


def _whole_groups(columns: int, structure: NM) -> int:
    """So many columns, or a few less that are whole groups; one group at least."""
    return structure.m * max(columns // structure.m, 1)


def _block(part: Tensor, triangle: Tensor, chosen: Tensor | NM, name: str) -> tuple[Tensor, Tensor]:
    """Prune the columns of one block in place; their errors, and the mask."""
    columns = part.T.contiguous()  # so that a column lies in one piece
    errors = torch.empty_like(columns)
    diagonal = triangle.diagonal().unsqueeze(1)
    width = _NARROW
    if isinstance(chosen, NM):
        width = _whole_groups(width, chosen)
        mask = torch.empty_like(columns, dtype=torch.bool)
        factors = torch.empty_like(columns)
    else:
        mask = chosen.T.contiguous()
        factors = ~mask / diagonal
    for start in range(0, len(columns), width):
        stop = min(start + width, len(columns))
        for i in range(start, stop):
            if isinstance(chosen, NM) and i % chosen.m == 0:
                group = slice(i, i + chosen.m)  # ranked with what earlier columns have made of it
                scores = (columns[group] / diagonal[group]).square().T
                mask[group] = n_m_mask(scores, chosen.n, chosen.m, name=name).T
                factors[group] = ~mask[group] / diagonal[group]
            torch.mul(columns[i], factors[i], out=errors[i])
            columns[i + 1 : stop].addr_(triangle[i, i + 1 : stop], errors[i], alpha=-1)
        columns[stop:].addmm_(triangle[start:stop, stop:].T, errors[start:stop], alpha=-1)
    part.copy_(torch.where(mask, columns, 0.0).T)
    return errors.T, mask.T
