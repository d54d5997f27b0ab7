"""Statistics of a layer's outputs, one number a channel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from sparsetrain.calibration import Calibration
from sparsetrain.candidates import Candidate
from sparsetrain.scores.base import Needs, Score


class ActivationMagnitude(Score):
    """Mean |output| of each channel over samples and positions (as in Hu et al. 2016).

    The output is that of the layer itself, before norm and activation.
    """

    kind: Literal["activation_magnitude"] = "activation_magnitude"
    data: ClassVar[Needs] = "inputs"
    per_channel: ClassVar[bool] = True

    def measure(
        self, model: nn.Module, candidates: Sequence[Candidate], calibration: Calibration
    ) -> dict[str, Tensor]:
        """[channels]"""
        sums = _sums(model, candidates, calibration, self.title, [torch.abs])
        return {name: total / count for name, (count, total) in sums.items()}


class ActivationVariance(Score):
    """Variance of the output of each channel over samples and positions.

    A channel that never changes can be put into the next layer's bias.
    """

    kind: Literal["activation_variance"] = "activation_variance"
    data: ClassVar[Needs] = "inputs"
    per_channel: ClassVar[bool] = True

    def measure(
        self, model: nn.Module, candidates: Sequence[Candidate], calibration: Calibration
    ) -> dict[str, Tensor]:
        """[channels], with the number of values as the divisor."""
        sums = _sums(model, candidates, calibration, self.title, [torch.clone, torch.square])
        found = {}
        for name, (count, total, squares) in sums.items():
            found[name] = (squares / count - (total / count).square()).clamp_min(0.0)
        return found


def _sums(
    model: nn.Module,
    candidates: Sequence[Candidate],
    calibration: Calibration,
    who: str,
    functions: Sequence[Callable[[Tensor], Tensor]],
) -> dict[str, list[Tensor]]:
    """Number of values a channel, and sums of functions of them, in float64."""
    sums: dict[str, list[Tensor]] = {}

    def see(candidate: Candidate, given: Tensor, output: Tensor) -> None:
        values = channels_second(candidate, output).transpose(0, 1).flatten(1).double()
        found = [torch.tensor(values.shape[1]), *(f(values).sum(1) for f in functions)]
        known = sums.get(candidate.name, [torch.zeros_like(value) for value in found])
        sums[candidate.name] = [a + b for a, b in zip(known, found, strict=True)]

    calibration.watch(model, candidates, who, see)
    add_up = calibration.ranks.sum
    return {c.name: [add_up(value) for value in sums[c.name]] for c in candidates}


def channels_second(candidate: Candidate, output: Tensor) -> Tensor:
    """A layer's output as [samples, channels, ...]: those of Linear layers are last."""
    is_linear = isinstance(candidate.owners[0], nn.Linear)
    return output.movedim(-1, 1) if is_linear else output
