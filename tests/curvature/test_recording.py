"""Passes over a recorded batch that do not all come to the same layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparsetrain.batches import Batch
from sparsetrain.curvature.recording import Recording
from sparsetrain.evaluating import wanting


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(5, 2), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.left(x), self.right(x)


@pytest.mark.parametrize("shape", [(9, 5), (9, 3, 5)])
@pytest.mark.parametrize("first", [0, 1])
def test_layers_that_the_last_pass_does_not_come_to(shape: tuple[int, ...], first: int) -> None:
    torch.manual_seed(0)
    model, x = TwoHeads().double(), torch.randn(shape, dtype=torch.float64)
    modules = {"left": model.left, "right": model.right}
    sums: dict[nn.Parameter, Tensor] = {}
    with wanting(model, ()):
        recording = Recording(model, modules, Batch((x,), {}, None, 9), 100, sums)
        recording.go_back(recording.outputs[first].sum(), again=True)
        recording.go_back(recording.outputs[1 - first].sum())
    expected = x.reshape(9, -1, 5).sum(1).square().sum(0).expand(2, 5)
    for layer in (model.left, model.right):
        torch.testing.assert_close(sums[layer.weight], expected)
