"""What goes into a layer and comes out of it at sampled places, as rows of a regression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsetrain.calibration import Calibration
from sparsetrain.candidates import Candidate, find_candidates
from sparsetrain.channels.sides import Side
from sparsetrain.convolution import TRANSPOSED, patches


class Rows(NamedTuple):
    """Sampled places of a layer.

    Attributes:
        inputs: [rows, inputs, numbers of an input]: patches of a convolution, or single numbers.
        outputs: [rows, outputs], without the bias.
    """

    inputs: Tensor
    outputs: Tensor

    def contributions(self, weight: Tensor, side: Side) -> Tensor:
        """[rows, outputs, channels]: what each channel of a coupling adds to each output.

        Args:
            weight: of the layer.
            side: the layer as one that the coupling's channels go into.
        """
        weight = weight.reshape(len(weight), self.inputs.shape[1], -1)
        parts = torch.einsum("rik,oik->roi", self.inputs, weight)
        return torch.stack([parts[..., list(places)].sum(-1) for places in side.places], -1)


def sampled_rows(
    model: nn.Module,
    sides: Sequence[Side],
    calibration: Calibration,
    who: str,
    *,
    places: int,
) -> dict[str, Rows]:
    """Name of each layer -> rows, the same places of the same samples for the same seed.

    Args:
        sides: layers of the model, Linear or convolutions without groups.
        places: positions (or tokens) of each sample; as many as there are, if those are fewer.

    Raises:
        ValueError: data are missing or do not reach a layer, or a layer has groups.
    """
    by_module = {id(side.module): side for side in sides}
    candidates = [
        c
        for c in find_candidates(model)
        if c.is_product and any(id(owner) in by_module for owner in c.owners)
    ]
    for side in sides:
        if getattr(side.module, "groups", 1) > 1 or isinstance(side.module, TRANSPOSED):
            raise ValueError(
                f"{who} takes the next layer apart, which cannot be done for {side.layer}: it has "
                "groups or is transposed; leave the channels before it out by `ratio`"
            )
    generators = {c.name: torch.Generator().manual_seed(calibration.seed) for c in candidates}
    found: dict[str, list[Rows]] = {c.name: [] for c in candidates}

    def see(candidate: Candidate, given: Tensor, output: Tensor) -> None:
        module = candidate.owners[0]
        rows = _rows(module, given, output, places, generators[candidate.name])
        found[candidate.name].append(rows)

    calibration.watch(model, candidates, who, see)
    layers = {c.name: by_module[id(c.owners[0])].layer for c in candidates}
    return {layers[name]: _joined(parts) for name, parts in found.items()}


def _joined(parts: Sequence[Rows]) -> Rows:
    return Rows(torch.cat([p.inputs for p in parts]), torch.cat([p.outputs for p in parts]))


def _rows(
    module: Any, given: Tensor, output: Tensor, places: int, generator: torch.Generator
) -> Rows:
    bias = 0.0 if module.bias is None else module.bias.detach()
    if isinstance(module, nn.Linear):
        samples = len(given)  # what lies between samples and numbers are tokens
        given = given.reshape(samples, -1, given.shape[-1])
        output = output.reshape(samples, -1, output.shape[-1])
        sample, place = _drawn(len(output), output.shape[1], places, generator)
        return Rows(given[sample, place].unsqueeze(-1), output[sample, place] - bias)
    size = output.shape[2:]
    sample, place = _drawn(len(output), size.numel(), places, generator)
    at = torch.unravel_index(place, size)
    dims = len(size)
    view = patches(module, given, size).permute(
        0, *range(2 + dims, 2 + 2 * dims), *range(1, 2 + dims)
    )
    outputs = output.movedim(1, -1)[(sample, *at)]
    return Rows(view[(sample, *at)].flatten(2), outputs - bias)


def _drawn(
    samples: int, positions: int, places: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Which places of which samples: without repeats within a sample."""
    count = min(places, positions)
    order = torch.rand(samples, positions, generator=generator).argsort(1)[:, :count]
    return torch.arange(samples).repeat_interleave(count), order.reshape(-1)
