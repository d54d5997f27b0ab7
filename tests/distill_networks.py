"""Students and teachers for the tests of distillation."""

from __future__ import annotations

from typing import Any

import torch
from runs import batch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsetrain as st


class Net(nn.Module):
    """Two convolutions with batch normalisation, of any widths; [N, 4, 4, 4] -> [N, 3]."""

    def __init__(self, widths: tuple[int, int] = (8, 6), seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(4, widths[0], 3, padding=1)
        self.norm = nn.BatchNorm2d(widths[0])
        self.body = nn.Sequential(nn.Conv2d(widths[0], widths[1], 3), nn.ReLU())
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(widths[1] * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        return self.head(self.drop(self.body(x)).flatten(1))


class Tokens(nn.Module):
    """Self-attention over tokens, as a Hugging Face model gives it."""

    class Output(dict[str, Any]):
        __getattr__ = dict.get

    def __init__(self, width: int = 8, heads: int = 2, seed: int = 0, eager: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.heads, self.eager = heads, eager
        self.embed = nn.Linear(5, width)
        self.query = nn.Linear(width, 4 * heads)
        self.key = nn.Linear(width, 4 * heads)
        self.block = nn.Linear(width, width)
        self.head = nn.Linear(width, 7)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Output:
        hidden = self.embed(x)
        query, key = (
            layer(hidden).unflatten(2, (self.heads, 4)).transpose(1, 2)
            for layer in (self.query, self.key)
        )
        weights = (query @ key.transpose(2, 3) / 2).softmax(-1)
        hidden = self.block(weights.mean(1) @ hidden)
        logits = self.head(hidden)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return self.Output(logits=logits, loss=loss, attentions=(weights,) if self.eager else None)


def x64(seed: int = 0, samples: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 4, 4, 4, generator=generator, dtype=torch.float64)


def pair64(widths: tuple[int, int] = (8, 6)) -> tuple[Net, Net]:
    return Net(widths, 1).double(), Net((8, 6), 2).double()


def outputs_by_hand(model: Net, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of conv, of body, and logits, in evaluation mode."""
    first = model.conv(x)
    second = model.body(F.relu(model.norm(first)))
    return first, second, model.head(second.flatten(1))


def everything(student: nn.Module, teacher: nn.Module, **more: Any) -> st.Distillation:
    options = {
        "loss_fn": F.cross_entropy,
        "hidden": ["conv", "body"],
        "attention": ["norm"],
        "example_inputs": batch(0)[0][:2],
    }
    return st.distill(student, teacher, **(options | more))


def hooks_of(model: nn.Module) -> int:
    names = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called")
    return sum(len(getattr(module, name)) for module in model.modules() for name in names)
