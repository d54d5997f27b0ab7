"""The best of each row, some rows at a time, against a stable sort."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsetrain.selection import group_top_k


def by_sorting(scores: Tensor, k: int) -> Tensor:
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, order, True)


@pytest.mark.parametrize("levels", [1, 3, 100, 0])
@pytest.mark.parametrize(
    ("rows", "columns"),
    [(5, 9), (3000, 17), (3, 200_000), (700, 1000)],  # the last two are shared by threads
)
def test_ties_go_to_the_lower_column(rows: int, columns: int, levels: int) -> None:
    generator = torch.Generator().manual_seed(levels)
    scores = torch.rand(rows, columns, generator=generator)
    if levels:
        scores = (scores * levels).floor()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for k in (1, columns // 2, columns - 1):
            assert torch.equal(group_top_k(scores, k), by_sorting(scores, k))
    finally:
        torch.set_num_threads(threads)


def test_one_row_with_ties_among_many_without() -> None:
    scores = torch.rand(100, 50, generator=torch.Generator().manual_seed(0))
    scores[37, ::2] = 2.0
    assert torch.equal(group_top_k(scores, 10), by_sorting(scores, 10))


def test_rows_may_lie_apart_in_memory() -> None:
    scores = torch.rand(40, 90, generator=torch.Generator().manual_seed(0)).T
    assert torch.equal(group_top_k(scores, 11), by_sorting(scores, 11))
