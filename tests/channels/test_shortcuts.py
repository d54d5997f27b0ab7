"""LASSO makes up for what went wrong in the shortcut that a layer's output is added to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import sparsetrain as st
from sparsetrain.channels import LassoChannels
from sparsetrain.channels.shortcuts import addends

X = torch.randn(24, 1, 6, 6, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A residual block; its sum is written in one of torch's ways."""

    def __init__(self, norm: bool, way: str) -> None:
        super().__init__()
        self.inner = nn.Conv2d(4, 8, 3, padding=1)
        self.outer = nn.Conv2d(8, 4, 3, padding=1, bias=not norm)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.outer(torch.relu(self.inner(x))))
        if self.way == "in place":
            y += x
            return y
        return {"plus": lambda: y + x, "turned": lambda: x + y, "add": lambda: torch.add(x, y)}[
            self.way
        ]()


class Twice(nn.Module):
    """Two blocks: what goes wrong in the first is in the second's shortcut."""

    def __init__(self, norm: bool, way: str) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3)
        self.first, self.second = Block(norm, way), Block(norm, way)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.stem(x))))


def network(norm: bool, way: str = "plus") -> Twice:
    torch.manual_seed(0)
    model = Twice(norm, way).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 2.0)
                module.bias.normal_()
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
    return model


@torch.no_grad()
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("way", ["plus", "turned", "in place", "add"])
def test_against_a_direct_solve(norm: bool, way: str) -> None:
    model = network(norm, way)
    ratio = {"first.inner": 0.75, "second.inner": 0.5}
    method = LassoChannels(places=16)  # every position of the 4 x 4
    smaller = st.channels.prune(model, X[:1], method, ratio, calibration=[X]).model

    before = smaller.first(smaller.stem(X))  # the shortcut of the second block, as it is now
    wanted = model.second(model.first(model.stem(X))) - before  # what the branch should give
    if norm:
        n = smaller.second.norm
        scale = n.weight / (n.running_var + n.eps).sqrt()
        wanted = (wanted - n.bias.view(1, -1, 1, 1)) / scale.view(1, -1, 1, 1)
        wanted = wanted + n.running_mean.view(1, -1, 1, 1)
    inputs = torch.relu(smaller.second.inner(before))
    patches = nn.functional.unfold(inputs, 3, padding=1).transpose(1, 2).flatten(0, 1)
    rows = wanted.flatten(2).transpose(1, 2).flatten(0, 1)
    if not norm:
        patches = torch.cat([patches, torch.ones(len(patches), 1)], 1)
    solution = torch.linalg.pinv(patches.double()).matmul(rows.double()).float()
    weight = smaller.second.outer.weight.flatten(1)
    torch.testing.assert_close(weight, solution[: weight.shape[1]].T, rtol=1e-3, atol=1e-4)


def test_only_sums_with_the_layer_s_output_count() -> None:
    model = network(True)
    seen: list[tuple[str, Tensor]] = []
    names = {module: name for name, module in model.named_modules()}
    layers = [model.stem, model.second.outer]
    with addends(model, layers, lambda layer, other: seen.append((names[layer], other))):
        model(X)
        _ = model.stem.weight + model.stem.weight
        _ = model.stem(X) + torch.ones(1, 4, 1, 1)
    assert [name for name, _ in seen] == ["stem", "second.outer"]
    torch.testing.assert_close(seen[1][1], model.first(model.stem(X)))
    assert all(not module._forward_hooks for module in model.modules())
