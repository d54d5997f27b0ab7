"""Knobs that are turned by removing channels: a ratio for each coupling."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from sparsetrain.batches import Adapter
from sparsetrain.calibration import Calibration
from sparsetrain.candidates import unwrapped
from sparsetrain.channels.counts import Counts, Plan, check_rounding
from sparsetrain.channels.coupling import Coupling, couplings
from sparsetrain.channels.cutting import Cutter
from sparsetrain.channels.methods import ChannelMethod, method_of
from sparsetrain.channels.removal import check_plain
from sparsetrain.channels.resizing import channels_gone, resized
from sparsetrain.cost.layers import LayerUse
from sparsetrain.curvature.losses import LossFunction
from sparsetrain.scores import Score
from sparsetrain.search.knobs import Knob, Knobs, Pruning, Ratios


@dataclass(frozen=True)
class Channels(Pruning):
    """Remove the least important channels of each coupling.

    Attributes:
        method: as for `st.channels.prune`; scores are measured once.
        floor: share of its channels that every layer keeps at least, in [0, 1).
        round_to: kept channels are rounded up to a multiple of this.
        calibration, loss_fn, adapter: for methods that need data.
        seed: of whatever is random.
    """

    method: ChannelMethod | Score | str | Mapping[str, Any] = "l1"
    floor: float = 0.0
    round_to: int = 1
    calibration: Iterable[Any] | None = None
    loss_fn: LossFunction | None = None
    adapter: Adapter | None = None
    seed: int = 0

    def bind(self, model: nn.Module, example_inputs: Any) -> ChannelKnobs:
        """Find the couplings and measure the scores.

        Raises:
            ImportError: torch-pruning is not installed.
            ValueError: as `st.channels.prune`, or there are no example inputs.
        """
        if example_inputs is None:
            raise ValueError("which channels go together is traced: give example_inputs")
        check_rounding(self.floor, self.round_to)
        check_plain(unwrapped(model))
        return ChannelKnobs(self, unwrapped(model), example_inputs)


class ChannelKnobs(Knobs):
    """A ratio for each coupling."""

    def __init__(self, pruning: Channels, model: nn.Module, example_inputs: Any) -> None:
        self.pruning, self.method = pruning, method_of(pruning.method)
        self.couplings = couplings(model, example_inputs)
        given = Calibration(pruning.calibration, pruning.loss_fn, pruning.adapter, pruning.seed)
        every = self.couplings
        self.cutter = Cutter.of(model, example_inputs, every, every, self.method, given)
        scores = self.cutter.scores
        self.turned = [c for c in every if scores is None or c.name in scores]
        if not self.turned:
            raise ValueError("the model has no channels that could be removed")
        super().__init__(model, example_inputs, [_knob(c, pruning.round_to) for c in self.turned])

    def counts(self, ratios: Ratios) -> Counts:
        """Name of a coupling -> how many channels it keeps.

        More than asked for where the last channel of a layer would go.
        """
        asked = self._plan(self.checked(ratios)).at(0.0)
        gone = channels_gone(self.turned, asked, self.cutter.orders)
        return {c.name: c.channels - len(gone.get(c.name, ())) for c in self.turned}

    def network(self, ratios: Ratios) -> nn.Module:
        """A smaller network."""
        return self.cutter.cut(self.counts(ratios)).finish()

    def rounded(self, ratios: Ratios) -> dict[str, float]:
        """Whole channels are kept."""
        counts = self.counts(ratios)
        return {knob.name: 1 - counts[knob.name] / knob.size for knob in self.knobs}

    def layers(self, ratios: Ratios) -> list[LayerUse]:
        """The model's layers with fewer channels."""
        return resized(self.uses, self.couplings, self.counts(ratios), self.cutter.orders)

    def describe(self) -> dict[str, Any]:
        """The method and how counts are rounded."""
        rounding = {"floor": self.pruning.floor, "round_to": self.pruning.round_to}
        return {
            "channels": self.method.model_dump(mode="json"),
            **rounding,
            "seed": self.pruning.seed,
        }

    def _plan(self, asked: Mapping[str, float]) -> Plan:
        return Plan(self.turned, asked, None, False, self.pruning.floor, self.pruning.round_to)


def _knob(coupling: Coupling, round_to: int) -> Knob:
    layers = dict.fromkeys(side.layer for side in coupling.sides)
    step = round_to / coupling.channels
    return Knob(coupling.name, coupling.channels, tuple(layers), step)
