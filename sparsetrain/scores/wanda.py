"""Wanda: weights and activations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrain.calibration import Calibration, in_float
from sparsetrain.candidates import Candidate
from sparsetrain.convolution import padded_input
from sparsetrain.part import part_of
from sparsetrain.scores.base import Needs, Scope, Score


class Wanda(Score):
    """|w_ij| ||x_j||, the weight times the norm of its input over all positions.

    Sun et al. 2024, "A simple and effective pruning approach for large language models", eq. 1. The
    squared norm is a mean over samples (sequences), a sum over the positions in each, as in the
    authors' code. Compared within each output: `st.prune(..., scope="row")`. For convolutions an
    input is a channel at a position of the kernel.
    """

    kind: Literal["wanda"] = "wanda"
    scope: ClassVar[Scope] = "row"
    data: ClassVar[Needs] = "inputs"

    def measure(
        self, model: nn.Module, candidates: Sequence[Candidate], calibration: Calibration
    ) -> dict[str, Tensor]:
        """|w| ||x||, of the weight's shape."""
        norms = input_norms(model, candidates, calibration, self.title)
        return {c.name: _product(c, norms[c.name]) for c in candidates}


def _product(candidate: Candidate, norm: Tensor) -> Tensor:
    part = part_of(candidate.name, candidate.param)
    here = norm if norm.dim() == 1 else part.held(norm)  # a convolution's has the weight's shape
    return part.wrap((part.held(candidate.param) * here).abs_())


def input_norms(
    model: nn.Module, candidates: Sequence[Candidate], calibration: Calibration, who: str
) -> dict[str, Tensor]:
    """Root of the mean over samples of the squared norm of each weight's input.

    Returns:
        Name -> a tensor that multiplies with the whole weight.
    """
    squares: dict[str, Tensor] = {}

    def see(candidate: Candidate, given: Tensor, output: Tensor) -> None:
        square = _squares(candidate, in_float(given))
        known = squares.get(candidate.name)
        squares[candidate.name] = square if known is None else known + square

    samples = calibration.watch(model, candidates, who, see)
    sums = {c.name: calibration.ranks.sum(squares[c.name]) for c in candidates}
    return {name: (square / samples).sqrt() for name, square in sums.items()}


def _squares(candidate: Candidate, given: Tensor) -> Tensor:
    """Squared inputs summed over samples and positions, so that they multiply with the weight."""
    module: Any = candidate.owners[0]
    if isinstance(module, nn.Linear):
        return given.reshape(-1, given.shape[-1]).square().sum(0)
    if candidate.is_transposed:
        raise ValueError(f"score 'wanda' knows no inputs of the transposed {candidate.name}")
    weight = candidate.param
    # A convolution of the squares with a kernel of one 1, for each place of the kernel.
    channels, places = given.shape[1], math.prod(weight.shape[2:])
    kernel = torch.eye(places, dtype=given.dtype, device=given.device)
    kernel = kernel.reshape(places, 1, *weight.shape[2:]).repeat(
        channels, *[1] * (weight.dim() - 1)
    )
    sums = _convolved(module, given.square(), kernel, channels).sum((0, *range(2, weight.dim())))
    per_group = rearrange(sums, "(g i p) -> g i p", g=module.groups, p=places)
    outputs = weight.shape[0] // module.groups
    return per_group.repeat_interleave(outputs, 0).reshape(weight.shape)


def _convolved(module: Any, squares: Tensor, kernel: Tensor, groups: int) -> Tensor:
    convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[squares.dim()]
    squares, padding = padded_input(module, squares)
    found: Tensor = convolve(squares, kernel, None, module.stride, padding, module.dilation, groups)
    return found
