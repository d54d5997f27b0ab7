"""What a convolution does to its input before it multiplies."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F


def padded_input(module: Any, given: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The input with the padding that torch's functions cannot be told, and the rest of it.

    Args:
        module: Conv1d, Conv2d or Conv3d.

    Returns:
        Input, and zeros that both sides of each dimension still get.
    """
    none = (0,) * len(module.stride)
    both = module._reversed_padding_repeated_twice
    if module.padding_mode != "zeros":
        return F.pad(given, both, mode=module.padding_mode), none
    if isinstance(module.padding, str):  # "same" may be uneven
        return F.pad(given, both), none
    return given, tuple(module.padding)
