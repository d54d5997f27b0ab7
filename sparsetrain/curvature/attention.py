"""torch's attention with its projections as layers of their own.

`nn.MultiheadAttention` multiplies with its weights in one large function, where nobody sees what
goes into them. Meanwhile it computes the same with a Linear layer for each of its two matrices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attentions:
    """The self-attentions of a model that can be computed by layers.

    Args:
        model: parametrized projections and subclasses with a forward of their own are left out.

    Attributes:
        layers: name -> Linear layer that has the parameters of an attention's `in_proj`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = {name: m for name, m in model.named_modules() if _is_plain(m)}
        self.layers = {name: _projection(module) for name, module in self._modules.items()}

    @contextmanager
    def by_layers(self) -> Iterator[None]:
        """Computed by layers meanwhile."""
        try:
            for name, module in self._modules.items():
                module.forward = partial(_forward, module, self.layers[name])
            yield
        finally:
            for module in self._modules.values():
                vars(module).pop("forward", None)


def _is_plain(module: Any) -> bool:
    if type(module) is not nn.MultiheadAttention or "forward" in vars(module):
        return False
    is_packed = module._parameters.get("in_proj_weight") is not None
    return is_packed and module.bias_k is None and not module.add_zero_attn


def _projection(module: nn.MultiheadAttention) -> nn.Linear:
    has_bias = module.in_proj_bias is not None
    layer = nn.Linear(module.embed_dim, 3 * module.embed_dim, has_bias, device="meta")
    layer.weight = module.in_proj_weight
    if has_bias:
        layer.bias = module.in_proj_bias
    return layer


def _forward(
    module: nn.MultiheadAttention,
    projection: nn.Linear,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What `nn.MultiheadAttention` gives in evaluation mode; its own way for anything special."""
    is_special = not (query is key is value) or query.dim() != 3 or query.is_nested
    if is_special or (is_causal and attn_mask is None):
        given = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        return type(module).forward(module, query, key, value, *given)
    x = query if module.batch_first else query.transpose(0, 1)
    heads = projection(x).unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k, v = heads.unbind(0)
    bias = _bias(x, module.num_heads, key_padding_mask, attn_mask)
    weights: Tensor | None = None
    if need_weights:
        products = q @ k.transpose(-1, -2) / math.sqrt(heads.shape[-1])
        weights = torch.softmax(products if bias is None else products + bias, -1)
        mixed = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    output: Tensor = module.out_proj(mixed.transpose(1, 2).flatten(2))
    return output if module.batch_first else output.transpose(0, 1), weights


def _bias(x: Tensor, heads: int, padding: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Both masks, in a shape that goes with [samples, heads, tokens, tokens]."""
    samples, tokens, _ = x.shape
    biases = []
    if padding is not None:
        biases.append(_in_numbers(padding, x).view(samples, 1, 1, tokens))
    if mask is not None:
        shape = (samples, heads) if mask.dim() == 3 else (1, 1)
        biases.append(_in_numbers(mask, x).view(*shape, tokens, tokens))
    return sum(biases[1:], biases[0]) if biases else None


def _in_numbers(mask: Tensor, x: Tensor) -> Tensor:
    """Added to the products: minus infinity where a mask of bools is true."""
    if mask.dtype != torch.bool:
        return mask
    return x.new_zeros(mask.shape).masked_fill_(mask, -math.inf)
