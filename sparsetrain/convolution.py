"""Kinds of convolutions, and what one does to its input before it multiplies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


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


def patches(module: Any, given: Tensor, positions: Sequence[int]) -> Tensor:
    """What a convolution multiplies its weight with, as a view of the padded input.

    Args:
        module: Conv1d, Conv2d or Conv3d.
        given: its input, [samples, inputs, ...].
        positions: lengths of the output's last dimensions.

    Returns:
        [samples, inputs, *kernel, *positions]
    """
    given, padding = padded_input(module, given)
    given = F.pad(given, [side for both in reversed(padding) for side in (both, both)])
    strides = given.stride()
    kernel_steps = [s * d for s, d in zip(strides[2:], module.dilation, strict=True)]
    position_steps = [s * d for s, d in zip(strides[2:], module.stride, strict=True)]
    return given.as_strided(
        (*given.shape[:2], *module.kernel_size, *positions),
        (*strides[:2], *kernel_steps, *position_steps),
    )
