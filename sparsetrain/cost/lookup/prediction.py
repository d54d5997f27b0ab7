"""Predictions from measured layers and networks, prepared for being asked for often."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace

from sparsetrain.config import did_you_mean
from sparsetrain.cost.layers import LayerUse
from sparsetrain.cost.lookup.layers import Storage, is_depthwise
from sparsetrain.cost.lookup.passes import NetworkTime, Width
from sparsetrain.cost.lookup.plan import Plan
from sparsetrain.cost.lookup.uses import Measured, ShapeLatency, UseLatency


class Prediction:
    """What a table says of layers and of lists of layers.

    Args:
        networks: none while only layers have been measured; the sum is then that of the layers.
    """

    def __init__(
        self, plan: Plan, measured: Sequence[Measured], networks: Sequence[NetworkTime]
    ) -> None:
        reference = networks[0].total if networks else measured[0].reference
        shapes = [ShapeLatency(each, reference) for each in measured]
        self.layers = plan.layers
        self.uses: list[UseLatency] = []
        self.places: dict[str, list[int]] = {}
        for number, at in enumerate(plan.shape_of):
            self.uses.append(UseLatency(shapes[at], plan.shapes[at].follows))
            self.places.setdefault(plan.layers[number].name, []).append(number)
        self.before = 0.0
        if networks:
            self._learn([self._without_untimed(network) for network in networks])

    def _learn(self, networks: Sequence[NetworkTime]) -> None:
        for number, use in enumerate(self.uses):
            use.learn(number, self.layers[number], networks)
        # What is missing in the sum is what lies before the first layer, less what stopping the
        # time took.
        missing = [
            network.total - self.seconds(self._layers_of(network), _storages_of(network))
            for network in networks
        ]
        self.before = statistics.median(missing)

    def _layers_of(self, network: NetworkTime) -> list[LayerUse]:
        pairs = zip(self.layers, network.widths, strict=True)
        return [with_width(layer, width) for layer, width in pairs]

    def _without_untimed(self, network: NetworkTime) -> NetworkTime:
        """Layers that are no modules of their own count by themselves, not in the rest."""
        rests, last = list(network.rests), None
        for number, (layer, width) in enumerate(zip(self.layers, network.widths, strict=True)):
            if network.layers[number] is not None:
                last = number
            elif last is not None:
                alone = self.uses[number].seconds(with_width(layer, width), "dense", False) or 0.0
                rests[last] = max(rests[last] - alone, 0.0)
        return replace(network, rests=tuple(rests))

    def seconds(self, layers: Sequence[LayerUse], storages: Sequence[Storage] | None) -> float:
        """Seconds of a network; `storages` None for the quicker one of each layer."""
        found = self._walk(layers, storages)
        return self.before + sum(seconds + rest for _, seconds, rest in found)

    def layer(self, use: LayerUse, storage: Storage | None) -> float:
        """Seconds of one layer after a dense one."""
        return self._quicker(self.known(use), use, storage, False)[1]

    def storages(self, layers: Sequence[LayerUse]) -> list[Storage]:
        """The quicker storage of each."""
        return [storage for storage, _, _ in self._walk(layers, None)]

    def _walk(
        self, layers: Sequence[LayerUse], storages: Sequence[Storage] | None
    ) -> Iterator[tuple[Storage, float, float]]:
        """Storage of each layer in turn, seconds in it, and seconds from there to the next."""
        storage: Storage = "dense"
        chosen: dict[str, Storage] = {}
        counts: dict[str, int] = {}
        for number, use in enumerate(layers):
            known = self.known(use, counts.get(use.name, 0))
            counts[use.name] = counts.get(use.name, 0) + 1
            # A weight that is used again is held as it was before.
            wanted = chosen.get(use.name) if storages is None else storages[number]
            storage, seconds = self._quicker(known, use, wanted, storage == "csr")
            chosen[use.name] = storage
            yield storage, seconds, known.rest(use, storage)

    def known(self, use: LayerUse, count: int = 0) -> UseLatency:
        """What is known of a use, the `count`-th of its weight.

        Raises:
            ValueError: the table does not know it.
        """
        places = self.places.get(use.name)
        if places is None:
            near = did_you_mean(use.name, self.places)
            raise ValueError(f"the latency table does not know the layer {use.name}{near}")
        found = self.uses[places[min(count, len(places) - 1)]]
        if not found.shape.fits(use):
            raise ValueError(
                f"{use.name} is not as the latency table knows it: {use} is no smaller form of "
                f"{found.shape.full}; make a table for this network and batch"
            )
        return found

    def _quicker(
        self, known: UseLatency, use: LayerUse, storage: Storage | None, after_csr: bool
    ) -> tuple[Storage, float]:
        """The storage asked for, or the one that takes fewer seconds; and these.

        Raises:
            ValueError: the layer cannot be held so.
        """
        csr = known.seconds(use, "csr", after_csr) if storage != "dense" else None
        dense = known.seconds(use, "dense", after_csr) if storage != "csr" else None
        if csr is None and dense is None:
            raise ValueError(
                f"{use.name} was not measured in csr storage at a density of {use.density:.3g}: "
                "take 'dense', or make a table with lower sparsities"
            )
        if dense is None or (csr is not None and csr < dense):
            assert csr is not None
            return "csr", csr
        return "dense", dense


def with_width(layer: LayerUse, width: Width) -> LayerUse:
    """A layer as large as it is in a network."""
    groups = width.inputs if is_depthwise(layer) else layer.groups
    return replace(
        layer, inputs=width.inputs, outputs=width.outputs, groups=groups, density=width.density
    )


def _storages_of(network: NetworkTime) -> list[Storage]:
    return [width.storage for width in network.widths]
