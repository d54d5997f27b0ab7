"""What goes into a layer and comes out of it at sampled places, as rows of a regression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsetrain.calibration import Calibration
from sparsetrain.candidates import Candidate, find_candidates
from sparsetrain.channels.shortcuts import addends, inverse_scale
from sparsetrain.channels.sides import Side, require_plain
from sparsetrain.convolution import patches


class Rows(NamedTuple):
    """Sampled places of a layer.

    Attributes:
        inputs: [rows, inputs, numbers of an input]: patches of a convolution, or single numbers.
        outputs: [rows, outputs], without the bias.
        addend: [rows, outputs]: what the outputs are added to behind the layer, in its own units
            (divided by the scale of a batch normalisation in between); 0 where they are not.
    """

    inputs: Tensor
    outputs: Tensor
    addend: Tensor

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
    require_plain(sides, who)
    generators = {c.name: torch.Generator().manual_seed(calibration.seed) for c in candidates}
    by_owner = {id(c.owners[0]): c.name for c in candidates}
    found: dict[str, list[Rows]] = {c.name: [] for c in candidates}
    drawn: dict[str, _Places] = {}

    def see(candidate: Candidate, given: Tensor, output: Tensor) -> None:
        module, name = candidate.owners[0], candidate.name
        drawn[name] = _Places.drawn(module, output, places, generators[name])
        found[name].append(drawn[name].rows(module, given, output))

    def see_addend(layer: nn.Module, addend: Tensor) -> None:
        name = by_owner[id(layer)]
        seen = drawn[name].of(layer, addend) * inverse_scale(model, layer)
        found[name][-1] = found[name][-1]._replace(addend=seen)

    with addends(model, [c.owners[0] for c in candidates], see_addend):
        calibration.watch(model, candidates, who, see)
    layers = {c.name: by_module[id(c.owners[0])].layer for c in candidates}
    return {layers[name]: _joined(parts) for name, parts in found.items()}


def _joined(parts: Sequence[Rows]) -> Rows:
    return Rows(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


class _Places(NamedTuple):
    """Which places of which samples."""

    sample: Tensor
    place: Tensor

    @classmethod
    def drawn(cls, module: Any, output: Tensor, count: int, generator: torch.Generator) -> _Places:
        """At random, without repeats within a sample."""
        # What lies between samples and numbers of a Linear layer are tokens.
        sizes = output.shape[1:-1] if isinstance(module, nn.Linear) else output.shape[2:]
        samples, positions = len(output), sizes.numel()
        order = torch.rand(samples, positions, generator=generator).argsort(1)[:, :count]
        return cls(torch.arange(samples).repeat_interleave(order.shape[1]), order.reshape(-1))

    def of(self, module: Any, output: Tensor) -> Tensor:
        """[rows, outputs] of something like the layer's output."""
        last = output if isinstance(module, nn.Linear) else output.movedim(1, -1)
        return last.reshape(len(last), -1, last.shape[-1])[self.sample, self.place]

    def rows(self, module: Any, given: Tensor, output: Tensor) -> Rows:
        """Of a call of the layer."""
        bias = 0.0 if module.bias is None else module.bias.detach()
        outputs = self.of(module, output) - bias
        return Rows(self._inputs(module, given, output), outputs, torch.zeros_like(outputs))

    def _inputs(self, module: Any, given: Tensor, output: Tensor) -> Tensor:
        if isinstance(module, nn.Linear):
            return self.of(module, given).unsqueeze(-1)
        size = output.shape[2:]
        dims, at = len(size), torch.unravel_index(self.place, size)
        view = patches(module, given, size).permute(
            0, *range(2 + dims, 2 + 2 * dims), *range(1, 2 + dims)
        )
        return view[(self.sample, *at)].flatten(2)
