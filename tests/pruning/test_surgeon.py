"""The surgeon's blocks within blocks against the algorithm as it is printed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsetrain.pruning.surgeon import inverse_root, surgery
from sparsetrain.structures import NM


def problem(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """A weight, and the root of the inverse Hessian of inputs that go together."""
    generator = torch.Generator().manual_seed(columns)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    x = normal(4 * columns, columns) @ normal(columns, columns)
    return normal(rows, columns), inverse_root(x.T @ x, 0.01, name="fc")


def column_by_column(
    weight: Tensor, root: Tensor, keep: int | NM, block: int
) -> tuple[Tensor, Tensor]:
    """Frantar & Alistarh 2023, algorithm 1, every error spread over all columns at once."""
    work, mask = weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    columns, left = weight.shape[1], keep
    for i in range(columns):
        if isinstance(left, NM):
            group = slice(i, i + left.m) if i % left.m == 0 else None
            count = weight.shape[0] * left.n
        else:
            group = slice(i, min(i + block, columns)) if i % block == 0 else None
            count = round(left * (group.stop - i) / (columns - i)) if group else 0
        if group:
            scores = (work[:, group] / root.diagonal()[group]).square()
            if isinstance(left, NM):
                best = scores.topk(left.n, dim=1).indices
                mask[:, group] = torch.zeros_like(scores).scatter(1, best, 1.0).bool()
            else:
                bar = scores.flatten().sort(descending=True).values[count - 1]
                mask[:, group] = scores >= bar if count else False
                left -= count
        error = torch.where(mask[:, i], 0.0, work[:, i]) / root[i, i]
        work[:, i:] -= error.unsqueeze(1) * root[i, i:]
    return torch.where(mask, work, 0.0), mask


@pytest.mark.parametrize("columns", [15, 16, 17, 33, 60, 130])
@pytest.mark.parametrize("block", [20, 48, 128])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_narrow_blocks_change_nothing(columns: int, block: int, share: float) -> None:
    weight, root = problem(7, columns)
    keep = round(share * weight.numel())
    new, mask = surgery(weight, root, keep, name="fc", block=block)
    expected, its_mask = column_by_column(weight, root, keep, block)
    assert torch.equal(mask, its_mask)
    torch.testing.assert_close(new, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(new != 0, mask)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 3), (3, 5), (4, 20), (5, 8)])
@pytest.mark.parametrize("block", [4, 32, 128])
def test_blocks_take_whole_groups(n: int, m: int, block: int) -> None:
    weight, root = problem(7, 9 * m)
    new, mask = surgery(weight, root, NM(n=n, m=m), name="fc", block=block)
    expected, its_mask = column_by_column(weight, root, NM(n=n, m=m), block)
    assert torch.equal(mask, its_mask)
    torch.testing.assert_close(new, expected, rtol=1e-9, atol=1e-9)
    assert (mask.view(7, -1, m).sum(2) == n).all()
