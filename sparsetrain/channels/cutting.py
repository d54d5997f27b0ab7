"""A network and the way its channels are chosen, to be cut to any counts, any number of times."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor, nn

from sparsetrain.calibration import Calibration
from sparsetrain.channels.coupling import Coupling
from sparsetrain.channels.methods import LayerByLayer, Networks, Scoring
from sparsetrain.channels.removal import remove
from sparsetrain.channels.resizing import Orders, channels_gone


class Cut(NamedTuple):
    """A copy of the network, ready for its channels to be removed."""

    model: nn.Module
    couplings: list[Coupling]
    removed: dict[str, list[int]]

    def finish(self) -> nn.Module:
        """Remove the channels."""
        remove(self.removed, self.couplings, None)
        return self.model


def cut_to(
    model: nn.Module,
    found: Sequence[Coupling],
    counts: Mapping[str, int],
    orders: Orders | None = None,
) -> nn.Module:
    """A copy with as many channels, for what it costs; no method chooses them or makes up for them.

    Args:
        orders: in which channels go; the first ones go first where it is left out.
    """
    smaller, copied = copy.deepcopy((model, list(found)))
    remove(channels_gone(copied, counts, orders or {}), copied, None)
    return smaller


@dataclass(frozen=True)
class Cutter:
    """Chooses channels of a network, which stays as it is.

    Attributes:
        couplings: of the network.
        scores: name of a coupling -> [channels]; None where the method goes layer by layer.
    """

    model: nn.Module
    example_inputs: Any
    couplings: Sequence[Coupling]
    method: LayerByLayer | Scoring
    calibration: Calibration
    scores: Mapping[str, Tensor] | None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        example_inputs: Any,
        found: Sequence[Coupling],
        wanted: Sequence[Coupling],
        method: LayerByLayer | Scoring,
        calibration: Calibration,
    ) -> Cutter:
        """Measure the scores of the couplings that are `wanted`, if the method has scores."""
        scores = None
        if isinstance(method, Scoring):
            scores = method.scores(model, wanted, calibration)
        return cls(model, example_inputs, found, method, calibration, scores)

    @cached_property
    def orders(self) -> Orders:
        """Name of a coupling -> its channels, the lowest score first; empty without scores."""
        scores = self.scores or {}
        return {n: values.argsort(stable=True).tolist() for n, values in scores.items()}

    def cut(self, counts: Mapping[str, int]) -> Cut:
        """Choose channels, and change what the method changes so that less is lost with them.

        Args:
            counts: name of a coupling -> how many channels it keeps; all where it is left out.
        """
        smaller, copied = copy.deepcopy((self.model, list(self.couplings)))
        if isinstance(self.method, LayerByLayer):
            networks = Networks(smaller, copied, self.model, list(self.couplings))
            removed = self.method.prune_layers(networks, counts, self.calibration)
        else:
            scored = [c for c in self.couplings if c.name in self.orders]
            removed = channels_gone(scored, counts, self.orders)
            self.method.make_up(smaller, copied, removed, self.example_inputs)
        return Cut(smaller, copied, {name: gone for name, gone in removed.items() if gone})
