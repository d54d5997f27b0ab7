"""Small networks whose channels go together in every way, and random ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as some
from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    """A shortcut around grouped, depthwise and plain convolutions, then a Linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.inner_norm = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.grouped = nn.Conv2d(12, 12, 3, padding=1, groups=3)
        self.last = nn.Conv2d(12, 8, 1)
        self.head = nn.Linear(8 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        y = torch.relu(self.inner_norm(self.inner(x)))
        y = self.last(torch.relu(self.grouped(self.depthwise(y))))
        return self.head(F.adaptive_max_pool2d(x + y, 2).flatten(1))


class Concatenated(nn.Module):
    """Two branches side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(1, 4, 1), nn.Conv2d(1, 6, 3, padding=1)
        self.after = nn.Conv2d(10, 8, 3)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(torch.cat([self.left(x), self.right(x)], 1))
        return self.head(self.after(x).mean((2, 3)))


class Upwards(nn.Module):
    """Transposed convolutions with PReLU, one slope for all channels and one for each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one = nn.ConvTranspose2d(1, 6, 2, stride=2), nn.PReLU()
        self.second, self.each = nn.ConvTranspose2d(6, 4, 3, bias=False), nn.PReLU(4)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.each(self.second(self.one(self.first(x)))))


class Stream(nn.Module):
    """A width that an embedding, a Linear layer, a shortcut and a LayerNorm have in common."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(self.norm(x + torch.relu(self.inner(x))).mean(1))


class Tokens(nn.Module):
    """A layer of torch's transformer between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.block(self.embed(tokens)).mean(1))


def images(samples: int = 3) -> Tensor:
    return torch.randn(samples, 1, 8, 8, generator=torch.Generator().manual_seed(1))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "residual": (Residual, images),
    "concatenated": (Concatenated, images),
    "upwards": (Upwards, images),
    "tokens": (Tokens, lambda: torch.arange(15).view(3, 5) % 11),
}


class Stack(nn.Module):
    """Blocks one after the other, drawn at random: what hypothesis shrinks."""

    def __init__(self, blocks: Sequence[tuple[str, int]], flat: bool) -> None:
        super().__init__()
        self.kinds = [kind for kind, _ in blocks]
        self.blocks, width = nn.ModuleList(), 1
        for kind, wanted in blocks:
            outputs = width if kind in ("depthwise", "shortcut") else wanted
            self.blocks.append(_block(kind, width, outputs))
            width = outputs * 2 if kind == "branches" else outputs
        self.flat = flat
        self.head = nn.Linear(width * (16 if flat else 1), 3)

    def forward(self, x: Tensor) -> Tensor:
        for kind, block in zip(self.kinds, self.blocks, strict=True):
            if kind == "shortcut":
                x = x + block(x)
            elif kind == "branches":
                x = torch.cat([part(x) for part in block], 1)
            else:
                x = block(x)
        return self.head(F.adaptive_max_pool2d(x, 4 if self.flat else 1).flatten(1))


def _block(kind: str, inputs: int, outputs: int) -> nn.Module:
    if kind == "branches":
        return nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(inputs, outputs, k, padding=k // 2), nn.ReLU())
                for k in (1, 3)
            ]
        )
    if kind == "shortcut":
        inner = nn.Conv2d(inputs, 6, 3, padding=1)
        return nn.Sequential(inner, nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, inputs, 1))
    groups = {"depthwise": inputs, "grouped": 2 if inputs % 2 == 0 else 1}.get(kind, 1)
    layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, 3, padding=1, groups=groups)]
    if kind == "normalised":
        layers.append(nn.BatchNorm2d(outputs))
    return nn.Sequential(*layers, nn.ReLU())


KINDS = ["plain", "normalised", "grouped", "depthwise", "shortcut", "branches"]
stacks = some.builds(
    Stack,
    some.lists(
        some.tuples(some.sampled_from(KINDS), some.sampled_from([2, 4, 6])), min_size=1, max_size=5
    ),
    some.booleans(),
)


class Attention(nn.Module):
    """Four heads of six, in the usual style; `kind` says what is unusual."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, width = kind, 20 if kind == "narrow" else 24
        if kind in ("size", "narrow"):
            self.head_dim = width // 4
        if kind not in ("hard-coded", "size"):
            self.num_heads = 4
        if kind == "width":
            self.embed_dim = width
        if kind == "fused":
            self.qkv = nn.Linear(24, 3 * width)
        else:
            self.q = nn.Linear(24, width, bias=kind != "narrow")
            self.k, self.v = (
                nn.Linear(24, width // 2 if kind == "grouped queries" else width) for _ in range(2)
            )
        if kind == "nested":
            self.q = nn.Sequential(self.q, nn.Dropout(0.1))
        if kind == "norm of queries":
            self.q_norm = nn.LayerNorm(6)
        if kind == "norm of heads":
            self.head_norm = nn.LayerNorm(24)
        if kind == "slopes":
            self.register_buffer("slopes", torch.tensor([0.5, 0.25, 0.125, 0.0625]))
        if kind == "gates":
            self.gates = nn.Parameter(torch.rand(4, 1, 1))
        if kind == "talking":
            self.talk = nn.Linear(4, 4)
        self.out = nn.Linear(width, 24)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self._heads(x)
        if self.kind == "norm of queries":
            q = self.q_norm(q)
        if self.kind == "rotary":
            q, k = (part + torch.cat((-part[..., 3:], part[..., :3]), -1) for part in (q, k))
        weights = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        if self.kind == "slopes":
            weights = weights + self.slopes.view(-1, 1, 1) * torch.arange(length)
        if self.kind == "talking":
            weights = self.talk(weights.movedim(1, -1)).movedim(-1, 1)
        y = weights.softmax(-1) @ v
        if self.kind == "gates":
            y = self.gates * y
        sizes = {"width": getattr(self, "embed_dim", -1), "width of inputs": width}
        y = y.transpose(1, 2).reshape(batch, length, sizes.get(self.kind, -1))
        return self.out(self.head_norm(y) if self.kind == "norm of heads" else y)

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.kind == "fused":
            parts = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, -1)
            return parts.permute(2, 0, 3, 1, 4).unbind()
        if self.kind == "size":
            return self._split(x, -1, self.head_dim)
        if self.kind == "grouped queries":
            q, k, v = self._split(x, -1, 6)
            return q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        count = 4 if self.kind.startswith("hard-coded") else self.num_heads
        return self._split(x, count, -1)

    def _split(self, x: Tensor, *shape: int) -> tuple[Tensor, ...]:
        shape = (*x.shape[:2], *shape)
        return tuple(part(x).view(shape).transpose(1, 2) for part in (self.q, self.k, self.v))


class Transformer(nn.Module):
    """A block of such attention and an MLP between an embedding and a head."""

    def __init__(self, kind: str = "usual") -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 24), nn.LayerNorm(24)
        self.attention = Attention(kind)
        self.first, self.second = nn.Linear(24, 40), nn.Linear(40, 24)
        self.final_norm, self.head = nn.LayerNorm(24), nn.Linear(24, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.attention(self.norm(x))
        x = x + self.second(torch.relu(self.first(x)))
        return self.head(self.final_norm(x).mean(1))
