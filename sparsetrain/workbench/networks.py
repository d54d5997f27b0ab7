"""Reference networks, small enough for a laptop, built from a name and a seed."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrain.config import did_you_mean

Shape = tuple[int, ...]


def build(
    name: str,
    *,
    in_shape: Sequence[int],
    classes: int,
    seed: int = 0,
    widths: Sequence[int] | None = None,
) -> nn.Module:
    """Build a network by name, with weights that depend on `seed` alone.

    "lenet_300_100" and "lenet_5" (LeCun et al., 1998; the 20-50-500 form that pruning papers use),
    "mlp" (hidden layers of `widths` units, 1000-1000-1000 unless told) and "resnet_small" (three
    residual stages of 16, 32 and 64 channels, or three other `widths`, with batch norm; after He
    et al., 2016, section 4.2). `in_shape` is (channels, height, width) of one sample.

    PyTorch's global generator is left as it was. Raises ValueError for an unknown name, and when
    `widths` do not suit the network.
    """
    if name not in _BUILDERS:
        hint = did_you_mean(name, NETWORKS)
        raise ValueError(f"unknown network {name!r}: choose one of {', '.join(NETWORKS)}{hint}")
    if widths is not None and (not widths or min(widths) < 1):
        raise ValueError(f"widths={tuple(widths)}: give at least one width, each at least 1")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _BUILDERS[name](tuple(in_shape), classes, None if widths is None else tuple(widths))


def mlp(in_features: int, widths: Sequence[int], classes: int) -> nn.Sequential:
    """Fully connected layers fc1, fc2, ... with ReLU between them; takes images or flat inputs."""
    sizes = [in_features, *widths, classes]
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for number, (fan_in, fan_out) in enumerate(pairwise(sizes), start=1):
        layers[f"fc{number}"] = nn.Linear(fan_in, fan_out)
        if number < len(sizes) - 1:
            layers[f"relu{number}"] = nn.ReLU()
    return nn.Sequential(layers)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with batch norm, and a shortcut that is 1 x 1 where shapes change."""

    def __init__(self, fan_in: int, fan_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(fan_out)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(fan_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or fan_in != fan_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(fan_in, fan_out, 1, stride, bias=False), nn.BatchNorm2d(fan_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


def _lenet_300_100(in_shape: Shape, classes: int, widths: Shape | None) -> nn.Module:
    if widths is not None:
        raise ValueError("lenet_300_100 has fixed widths: use the network 'mlp' with widths")
    return mlp(math.prod(in_shape), (300, 100), classes)


def _mlp(in_shape: Shape, classes: int, widths: Shape | None) -> nn.Module:
    return mlp(math.prod(in_shape), widths or (1000, 1000, 1000), classes)


def _lenet_5(in_shape: Shape, classes: int, widths: Shape | None) -> nn.Module:
    if widths is not None:
        raise ValueError("lenet_5 has fixed widths: leave widths out")
    channels, height, width = in_shape
    # Two unpadded 5 x 5 convolutions and two poolings need 16 pixels; smaller images are padded.
    padding = 0 if min(height, width) >= 16 else 2
    rows, columns = (_after_pooling(size, padding) for size in (height, width))
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, 20, 5, padding=padding),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(20, 50, 5, padding=padding),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(50 * rows * columns, 500),
            relu3=nn.ReLU(),
            fc2=nn.Linear(500, classes),
        )
    )


def _after_pooling(size: int, padding: int) -> int:
    for _ in range(2):
        size = (size + 2 * padding - 4) // 2
    return size


def _resnet_small(in_shape: Shape, classes: int, widths: Shape | None) -> nn.Module:
    stages = widths or (16, 32, 64)
    stem = stages[0]
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv=nn.Conv2d(in_shape[0], stem, 3, padding=1, bias=False),
        norm=nn.BatchNorm2d(stem),
        relu=nn.ReLU(),
    )
    fan_in = stem
    for number, fan_out in enumerate(stages, start=1):
        layers[f"block{number}"] = ResidualBlock(fan_in, fan_out, 1 if number == 1 else 2)
        fan_in = fan_out
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(fan_in, classes)
    return nn.Sequential(layers)


_BUILDERS: dict[str, Callable[[Shape, int, Shape | None], nn.Module]] = {
    "lenet_300_100": _lenet_300_100,
    "lenet_5": _lenet_5,
    "mlp": _mlp,
    "resnet_small": _resnet_small,
}
NETWORKS = tuple(_BUILDERS)
