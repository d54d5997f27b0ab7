"""The two networks that are timed, at full and at tiny size, with data of their shapes."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: Parameters of ResNet-50 for 1000 classes and of GPT-2 small with a tied head.
PARAMETERS = {"resnet50": 25_557_032, "gpt2": 124_439_808}
#: Every matrix in GPT-2's blocks; embeddings and the tied head stay dense.
GPT2_RULE = "transformer.h.*.c_*.weight"
Source = Literal["transformers", "own"]


# ResNet-50 (He et al. 2016, table 1; the stride is in the 3 x 3 convolution, as in torchvision).


@dataclass(frozen=True)
class ResNetConfig:
    """Bottleneck blocks a stage; channels of the first stage; classes; side of the images."""

    blocks: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    classes: int = 1000
    side: int = 224


RESNET = {"full": ResNetConfig(), "tiny": ResNetConfig((1, 1), 8, 10, 32)}


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions beside a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            *_conv(inputs, width, 1),
            nn.ReLU(inplace=True),
            *_conv(width, width, 3, stride),
            nn.ReLU(inplace=True),
            *_conv(width, outputs, 1),
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Sequential(*_conv(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] -> [N, 4 width, H / stride, W / stride]."""
        return F.relu(self.body(x) + self.shortcut(x))


def resnet(config: ResNetConfig) -> nn.Module:
    """[N, 3, side, side] -> [N, classes]."""
    layers: list[nn.Module] = [
        *_conv(3, config.width, 7, 2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
    ]
    inputs = config.width
    for stage, blocks in enumerate(config.blocks):
        width = config.width << stage
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            layers.append(Bottleneck(inputs, width, stride))
            inputs = 4 * width
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, config.classes))
    return nn.Sequential(*layers, *head)


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return conv, nn.BatchNorm2d(outputs)


# GPT-2 small (Radford et al. 2019), by transformers' configuration or written out.


@dataclass(frozen=True)
class GPT2Sizes:
    """Blocks, width, heads, tokens that are known, tokens in a sequence."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    vocabulary: int = 50257
    length: int = 1024


GPT2 = {"full": GPT2Sizes(), "tiny": GPT2Sizes(2, 64, 2, 128, 16)}


class Attention(nn.Module):
    """Causal self-attention with one projection for queries, keys and values."""

    def __init__(self, sizes: GPT2Sizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.c_attn = nn.Linear(sizes.width, 3 * sizes.width)
        self.c_proj = nn.Linear(sizes.width, sizes.width)

    def forward(self, x: Tensor) -> Tensor:
        """[N, length, width] -> the same."""
        split = self.c_attn(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*split.unbind(0), is_causal=True)
        return self.c_proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Feedforward(nn.Module):
    """Two layers, four times as wide between them."""

    def __init__(self, sizes: GPT2Sizes) -> None:
        super().__init__()
        self.c_fc = nn.Linear(sizes.width, 4 * sizes.width)
        self.c_proj = nn.Linear(4 * sizes.width, sizes.width)

    def forward(self, x: Tensor) -> Tensor:
        """[N, length, width] -> the same."""
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and feedforward, each behind a norm and beside a shortcut."""

    def __init__(self, sizes: GPT2Sizes) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(sizes.width), nn.LayerNorm(sizes.width)
        self.attn, self.mlp = Attention(sizes), Feedforward(sizes)

    def forward(self, x: Tensor) -> Tensor:
        """[N, length, width] -> the same."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """GPT-2 without dropout, its head tied to the embedding; layers named as in transformers."""

    def __init__(self, sizes: GPT2Sizes) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(sizes.vocabulary, sizes.width),
                "wpe": nn.Embedding(sizes.length, sizes.width),
                "h": nn.ModuleList(Block(sizes) for _ in range(sizes.layers)),
                "ln_f": nn.LayerNorm(sizes.width),
            }
        )
        for embedding in (self.transformer["wte"], self.transformer["wpe"]):
            nn.init.normal_(embedding.weight, std=0.02)  # type: ignore[arg-type]

    def forward(self, tokens: Tensor) -> Tensor:
        """[N, length] -> logits [N, length, vocabulary]."""
        parts: Any = self.transformer
        x = parts["wte"](tokens) + parts["wpe"].weight[: tokens.shape[1]]
        for block in parts["h"]:
            x = block(x)
        return F.linear(parts["ln_f"](x), parts["wte"].weight)


class LogitsAlone(nn.Module):
    """transformers' model, which answers with an object, as a function of tokens to logits."""

    def __init__(self, sizes: GPT2Sizes) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        last = sizes.vocabulary - 1
        config = GPT2Config(
            n_layer=sizes.layers,
            n_embd=sizes.width,
            n_head=sizes.heads,
            vocab_size=sizes.vocabulary,
            n_positions=sizes.length,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=last,
            eos_token_id=last,
        )
        self.inner = GPT2LMHeadModel(config)

    def forward(self, tokens: Tensor) -> Tensor:
        """[N, length] -> logits [N, length, vocabulary]."""
        return self.inner(tokens, use_cache=False).logits  # type: ignore[no-any-return]


def gpt2_source(asked: str = "auto") -> Source:
    """Where GPT-2 comes from: transformers, where it is installed and nothing else is asked for."""
    if asked == "own" or (asked == "auto" and importlib.util.find_spec("transformers") is None):
        return "own"
    return "transformers"


def gpt2(sizes: GPT2Sizes, source: Source) -> nn.Module:
    """Tokens [N, length] -> logits [N, length, vocabulary]."""
    return Decoder(sizes) if source == "own" else LogitsAlone(sizes)


# What the benchmarks ask for.


@dataclass(frozen=True)
class Workload:
    """A network at a size, and its batch."""

    network: Literal["resnet50", "gpt2"]
    size: Literal["full", "tiny"]
    batch_size: int
    source: Source = "own"

    def model(self) -> nn.Module:
        """A fresh network, always the same weights.

        Raises:
            ValueError: it has not the parameters that the full network is known to have.
        """
        with torch.random.fork_rng():
            torch.manual_seed(0)
            if self.network == "resnet50":
                model = resnet(RESNET[self.size])
            else:
                model = gpt2(GPT2[self.size], self.source)
        count = sum(parameter.numel() for parameter in model.parameters())
        if self.size == "full" and count != PARAMETERS[self.network]:
            raise ValueError(f"{self.network} has {count:,} parameters, not those of the paper")
        return model

    def batch(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Inputs and targets, random and always the same: images, or tokens and the next ones."""
        generator = torch.Generator().manual_seed(1)
        if self.network == "resnet50":
            config = RESNET[self.size]
            shape = (self.batch_size, 3, config.side, config.side)
            x = torch.randn(shape, generator=generator)
            y = torch.randint(config.classes, (self.batch_size,), generator=generator)
        else:
            sizes = GPT2[self.size]
            shape = (self.batch_size, sizes.length + 1)
            tokens = torch.randint(sizes.vocabulary, shape, generator=generator)
            x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].reshape(-1)
        return x.to(device), y.to(device)

    def recipe(self, policy: dict[str, Any]) -> dict[str, Any]:
        """The policy on all Linear and Conv weights, or on the matrices in GPT-2's blocks."""
        if self.network == "resnet50":
            return {"policy": policy}
        prefix = "inner." if self.source == "transformers" else ""
        return {"rules": [{"match": prefix + GPT2_RULE, "policy": policy}]}
