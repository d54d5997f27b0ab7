"""A small decoder that reads characters, its linear maps as layers of their own.

Queries, keys, values and outputs of attention are separate Linear layers, so that hooks see the
inputs of each. What is pruned is the Linear weights of the blocks; embeddings and head stay dense.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

#: Names of what is pruned.
PRUNED = "blocks.*"


class Attention(nn.Module):
    """Causal attention of several heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[windows, positions, width] to the same shape."""
        query, key, value = (
            rearrange(layer(x), "n t (h d) -> n h t d", h=self.heads)
            for layer in (self.query, self.key, self.value)
        )
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        mixed: Tensor = self.out(rearrange(seen, "n h t d -> n t (h d)"))
        return mixed


class Block(nn.Module):
    """Attention, then two layers with GELU, each on normalised inputs and added to them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.before_attention = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.before_mlp = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[windows, positions, width] to the same shape."""
        x = x + self.attention(self.before_attention(x))
        out: Tensor = x + self.down(F.gelu(self.up(self.before_mlp(x))))
        return out


class CharTransformer(nn.Module):
    """Embeddings of characters and positions, blocks, a norm and an output head of its own."""

    def __init__(
        self, characters: int, *, context: int, width: int, blocks: int, heads: int
    ) -> None:
        super().__init__()
        self.characters = nn.Embedding(characters, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters)
        self._initialise()

    def _initialise(self) -> None:
        """As GPT-2: N(0, 0.02²), smaller for what is added to the residual stream."""
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(weight)
            elif weight.dim() == 2:
                is_added = name.endswith(("out.weight", "down.weight"))
                shrink = (2 * len(self.blocks)) ** -0.5 if is_added else 1.0
                nn.init.normal_(weight, std=0.02 * shrink)

    def prunable(self) -> dict[str, nn.Parameter]:
        """The weights that PRUNED names."""
        named = {f"blocks.{name}": weight for name, weight in self.blocks.named_parameters()}
        return {name: weight for name, weight in named.items() if weight.dim() == 2}

    def forward(self, text: Tensor) -> Tensor:
        """Logits [windows, positions, characters] of the next characters."""
        places = torch.arange(text.shape[1], device=text.device)
        x = self.characters(text) + self.positions(places)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits
