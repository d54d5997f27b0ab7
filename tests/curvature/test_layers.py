"""Per-sample gradients of convolutions, by groups and by patches, against autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsetrain.curvature import layers


def slow(module: nn.Module, x: Tensor, back: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*module.named_parameters(), strict=True)
    rows = [
        torch.autograd.grad(module(x[i : i + 1]), parameters, back[i : i + 1])
        for i in range(len(x))
    ]
    return {name: torch.stack([row[i] for row in rows]) for i, name in enumerate(names)}


@pytest.mark.parametrize("channels", [3, 8, 12])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"stride": 2, "padding": 1},
        {"dilation": 2, "padding": 3},
        {"padding": "same", "dilation": 2},
        {"padding": 2, "padding_mode": "circular", "stride": 3},
        {"groups": -1},
    ],
)
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_convolutions(kind: Any, channels: int, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    given = {**options, "groups": channels if options.get("groups") else 1}
    module = kind(channels, 2 * channels, 3, **given).double()
    dims = module.weight.dim() - 2
    # A part of a batch, whose channels come last in memory.
    x = torch.randn(6, *range(7, 7 + dims), channels, dtype=torch.float64).movedim(-1, 1)[2:5]
    back = torch.randn_like(module(x))
    found = layers.per_sample(module, x, back)
    expected = slow(module, x, back)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_patches_count_as_numbers_of_a_sample() -> None:
    back = torch.zeros(5, 2, 10, 10)
    assert layers.numbers_of_a_sample(nn.Conv2d(3, 2, 3), back) == 27 * 100
    assert layers.numbers_of_a_sample(nn.Conv2d(3, 200, 3), back) == 27 * 200 + 200
    assert layers.numbers_of_a_sample(nn.Conv2d(8, 2, 3), back) == 72 * 2 + 2
    assert layers.numbers_of_a_sample(nn.Linear(3, 2), back) == 8
