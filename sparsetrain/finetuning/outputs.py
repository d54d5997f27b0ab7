"""What a loss looks at in outputs: a tensor, or objects and mappings of Hugging Face's kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sparsetrain.calibration import in_float


def part_of(outputs: Any, name: str) -> Any:
    """An entry of outputs that are an object or a mapping; None where there is none."""
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)


def logits_of(outputs: Any, who: str, class_dim: int | None) -> Tensor:
    """Logits with classes last, as float32 or better.

    Raises:
        ValueError: there are none, or their classes could be along any dimension.
    """
    logits = outputs if isinstance(outputs, Tensor) else part_of(outputs, "logits")
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"{who} gave a {type(outputs).__name__} without logits: let it return a tensor, or an "
            "object with .logits"
        )
    if class_dim is None and logits.dim() > 3:
        raise ValueError(
            f"{who} gave logits of shape {tuple(logits.shape)}: say by class_dim which dimension "
            "counts classes (1 for images)"
        )
    return in_float(logits).movedim(-1 if class_dim is None else class_dim, -1)


def probabilities_of(outputs: Any, place: int, who: str) -> Tensor:
    """Attention probabilities of a layer, [samples, heads, queries, keys].

    Raises:
        ValueError: there are none, or not of that layer.
    """
    found = part_of(outputs, "attentions")
    if not found or not isinstance(found[0], Tensor):
        raise ValueError(
            f"attention={place}: {who} gave no attentions; call it with output_attentions=True, "
            "and load it with attn_implementation='eager'"
        )
    if not -len(found) <= place < len(found):
        raise ValueError(f"attention={place}: {who} gave attentions of {len(found)} layers")
    return in_float(found[place])
