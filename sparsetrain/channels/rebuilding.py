"""Methods that look at the next layer: which of its inputs it can do without, and how it makes up.

Layers are taken in their order, each in the network whose earlier layers have been pruned.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from sparsetrain.calibration import Calibration
from sparsetrain.channels.coupling import Coupling
from sparsetrain.channels.methods import LayerByLayer, Networks
from sparsetrain.channels.reconstruction import (
    greedy_discard,
    lasso_path,
    least_squares,
    matching_pursuit,
    solved,
)
from sparsetrain.channels.removal import silence
from sparsetrain.channels.rows import Rows, sampled_rows
from sparsetrain.channels.sides import Side


class Next(NamedTuple):
    """A layer that channels go into, and what it should give."""

    side: Side
    rows: Rows
    target: Tensor  # [rows, outputs], without the bias

    @classmethod
    def of(cls, side: Side, rows: Rows, wanted: Rows) -> Next:
        """The layer should give what it gave, and make up for what went wrong in its addend."""
        return cls(side, rows, wanted.outputs + wanted.addend - rows.addend)

    def contributions(self) -> Tensor:
        """[rows, outputs, channels], with the weight as it is."""
        return self.rows.contributions(self.side.module.weight.detach(), self.side)


class Rebuilding(LayerByLayer):
    """Base of methods that look at the next layer. They need inputs."""

    #: Whether the layer should give what it gave in the network as it was.
    asymmetric: ClassVar[bool] = False

    places: Annotated[int, Field(ge=1, description="positions of each sample to look at")] = 10

    @abstractmethod
    def kept(self, layers: Sequence[Next], count: int, seed: int) -> list[int]:
        """The channels to keep.

        Args:
            layers: every layer that they go into.
            count: how many.
        """

    @abstractmethod
    def rebuild(self, layer: Next, kept: Sequence[int], seed: int) -> None:
        """Change a layer's weight so that the channels that are kept do for all, in place."""

    def prune_layers(
        self, networks: Networks, counts: Mapping[str, int], calibration: Calibration
    ) -> dict[str, list[int]]:
        """Choose and rebuild, each layer on what the pruned ones before it give.

        Raises:
            ValueError: as `sampled_rows`.
        """
        removed: dict[str, list[int]] = {}
        pairs = zip(networks.couplings, networks.original_couplings, strict=True)
        for coupling, before in pairs:
            count = counts.get(coupling.name, coupling.channels)
            if count == coupling.channels:
                continue
            layers = self._next(networks, coupling, before, calibration)
            kept = self.kept(layers, count, calibration.seed)
            order = sorted(set(range(coupling.channels)) - set(kept))
            gone = coupling.removable(order, len(order))
            left = sorted(set(range(coupling.channels)) - set(gone))
            for layer in layers:
                self.rebuild(layer, left, calibration.seed)
            removed[coupling.name] = gone
            silence(removed, [coupling])
        return removed

    def _next(
        self, networks: Networks, coupling: Coupling, before: Coupling, calibration: Calibration
    ) -> list[Next]:
        """The layers that the channels go into."""
        who, sides = f"channel method {self.kind!r}", coupling.by_role("in")
        rows = sampled_rows(networks.pruned, sides, calibration, who, places=self.places)
        wanted = rows
        if self.asymmetric:
            sides_before = before.by_role("in")
            wanted = sampled_rows(
                networks.original, sides_before, calibration, who, places=self.places
            )
        return [Next.of(side, rows[side.layer], wanted[side.layer]) for side in sides]


class ThiNet(Rebuilding):
    """Channels whose sum says least to the next layer go; one factor a channel makes up for them.

    Luo et al. 2017, "ThiNet", algorithm 1 and eq. 7 ("discard"), and the journal version (2019),
    which takes the channels to keep by orthogonal matching pursuit ("keep").
    """

    kind: Literal["thinet"] = "thinet"
    greedy: Annotated[
        Literal["keep", "discard"], Field(description="which set grows channel by channel")
    ] = "keep"

    def kept(self, layers: Sequence[Next], count: int, seed: int) -> list[int]:
        """The channels to keep, ascending."""
        parts = [self._rows(layer, seed) for layer in layers]
        contributions = torch.cat([rows for rows, _ in parts])
        if self.greedy == "keep":
            return sorted(matching_pursuit(contributions, torch.cat([y for _, y in parts]), count))
        channels = contributions.shape[1]
        return sorted(set(range(channels)) - set(greedy_discard(contributions, channels - count)))

    @torch.no_grad()
    def rebuild(self, layer: Next, kept: Sequence[int], seed: int) -> None:
        """Multiply the weights of each channel that is kept by a factor of its own."""
        contributions, target = self._rows(layer, seed)
        columns = contributions[:, list(kept)].double()
        factors = solved(columns.T @ columns, columns.T @ target.double())
        weight = layer.side.module.weight
        for channel, factor in zip(kept, factors.tolist(), strict=True):
            weight[:, list(layer.side.places[channel])] *= factor

    def _rows(self, layer: Next, seed: int) -> tuple[Tensor, Tensor]:
        """One output of each row, drawn at random: [rows, channels] and [rows]."""
        generator = torch.Generator().manual_seed(seed)
        rows, outputs = layer.target.shape
        drawn = torch.randint(outputs, (rows,), generator=generator)
        at = torch.arange(rows), drawn
        return layer.contributions()[at], layer.target[at]


class LassoChannels(Rebuilding):
    """Channels by LASSO, then a least-squares fit of the next layer to the network as it was.

    He et al. 2017, "Channel pruning for accelerating very deep neural networks", eq. 3 to 5. Where
    outputs are added to a shortcut, they also make up for what went wrong there (section 3.3).
    """

    kind: Literal["lasso"] = "lasso"
    asymmetric: ClassVar[bool] = True

    rows: Annotated[int, Field(ge=1, description="rows that the LASSO problem has at most")] = 400

    def kept(self, layers: Sequence[Next], count: int, seed: int) -> list[int]:
        """The channels to keep, ascending."""
        parts, targets = [], []
        for layer in layers:
            generator = torch.Generator().manual_seed(seed)
            some = torch.randperm(len(layer.target), generator=generator)[: self.rows]
            fewer = Next(layer.side, Rows(*(t[some] for t in layer.rows)), layer.target[some])
            parts.append(fewer.contributions().flatten(0, 1))
            targets.append(fewer.target.flatten())
        return lasso_path(torch.cat(parts), torch.cat(targets), count, seed=seed)

    @torch.no_grad()
    def rebuild(self, layer: Next, kept: Sequence[int], seed: int) -> None:
        """Fit weight and bias anew, for all inputs that are left."""
        module, inputs = layer.side.module, layer.rows.inputs
        own = {place for places in layer.side.places for place in places}
        left = {place for channel in kept for place in layer.side.places[channel]}
        # A concatenation may bring inputs of other couplings, which stay.
        columns = [p for p in range(inputs.shape[1]) if p in left or p not in own]
        has_bias = module.bias is not None
        weight, bias = least_squares(
            inputs[:, columns].flatten(1), layer.target, intercept=has_bias
        )
        module.weight[:, columns] = weight.view(len(weight), len(columns), *module.weight.shape[2:])
        if has_bias:
            module.bias += bias
