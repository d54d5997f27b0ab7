"""What a latency table says of one layer, prepared for being asked often."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

from sparsetrain.cost.layers import LayerUse
from sparsetrain.cost.lookup.interpolation import Curve, Grid
from sparsetrain.cost.lookup.layers import Case, Shape, Storage, is_depthwise
from sparsetrain.cost.lookup.passes import NetworkTime


@dataclass(frozen=True)
class Measured:
    """Seconds of a shape's cases.

    Attributes:
        reference: seconds of the whole network, measured at the same time.
        seconds: of each case.
    """

    shape: Shape
    cases: tuple[Case, ...]
    reference: float
    seconds: tuple[float, ...]


#: Sizes whose factors are averaged: within this distance of logarithms, most of all.
_NEARBY = 0.3
#: What of a layer does not change with its channels.
_kept = attrgetter(
    *("kind", "kernel", "stride", "padding", "dilation", "in_size", "out_size", "repeats")
)


class ShapeLatency:
    """Seconds of a layer by itself, at any width and density."""

    def __init__(self, measured: Measured, reference: float) -> None:
        factor = reference / measured.reference
        self.full = measured.shape.use
        self.is_depthwise = is_depthwise(self.full)
        dense: dict[tuple[int, int], float] = {}
        csr: dict[bool, dict[float, float]] = {}
        after = None
        for case, seconds in zip(measured.cases, measured.seconds, strict=True):
            if case.storage == "csr":
                density = 1 - case.sparsity
                csr.setdefault(case.after_csr, {})[density] = factor * seconds
            elif case.after_csr:
                after = factor * seconds
            else:
                dense[case.inputs, case.outputs] = factor * seconds
        widths: dict[float, float] = {n: seconds for (n, _), seconds in dense.items()}
        self._grid = Grid(dense) if not self.is_depthwise else None
        self._line = Curve(widths)
        self._csr = {layout: Curve(values) for layout, values in csr.items()}
        whole = self.dense(self.full)
        #: How much longer the dense layer takes where a sparse one has laid out its input.
        self.after_csr = 1.0 if after is None else after / whole

    def dense(self, use: LayerUse) -> float:
        """Seconds of the dense layer."""
        return self._grid(use.inputs, use.outputs) if self._grid else self._line(use.inputs)

    def csr(self, use: LayerUse, after_csr: bool) -> float | None:
        """Seconds of the sparse layer; None where it cannot be, or is denser than measured."""
        curve = self._csr.get(after_csr) or self._csr.get(False)
        if curve is None or use.density > curve.points[-1] + 0.5 / use.weights + 1e-9:
            return None  # but for a count of non-zeros that was rounded
        return curve(use.density) * use.weights / self.full.weights

    def fits(self, use: LayerUse) -> bool:
        """Whether a layer is this one, perhaps with fewer channels, or a bias more or less."""
        groups = use.inputs if self.is_depthwise else self.full.groups
        smaller = use.inputs <= self.full.inputs and use.outputs <= self.full.outputs
        return smaller and use.groups == groups and _kept(use) == _kept(self.full)


class InNetwork:
    """How many times longer a layer takes in a network than by itself, by how long that is.

    In a network it finds other things in the caches, which matters more to some sizes than to
    others. Factors of sizes nearby are averaged (Nadaraya 1964, Watson 1964), because each was
    measured once.

    Args:
        pairs: seconds by itself and in the network; none for a factor of 1.
    """

    def __init__(self, pairs: Sequence[tuple[float, float]] = ()) -> None:
        self._sizes = [math.log(alone) for alone, _ in pairs]
        self._factors = [seconds / alone for alone, seconds in pairs]

    def __call__(self, alone: float) -> float:
        """Seconds in the network."""
        if not self._sizes:
            return alone
        size = min(max(math.log(alone), min(self._sizes)), max(self._sizes))
        far = [0.5 * ((size - s) / _NEARBY) ** 2 for s in self._sizes]
        nearest = min(far)  # which weighs 1, however far it is
        weights = [math.exp(nearest - distance) for distance in far]
        pairs = zip(weights, self._factors, strict=True)
        return alone * sum(w * factor for w, factor in pairs) / sum(weights)


class UseLatency:
    """Seconds of a use of a layer in its network, and from there to the next."""

    def __init__(self, shape: ShapeLatency, follows: bool) -> None:
        self.shape, self.follows = shape, follows
        self._in_network: dict[tuple[Storage, bool], InNetwork] = {}
        self._rest: Curve | None = None
        self._sparse_rest: float | None = None

    def seconds(self, use: LayerUse, storage: Storage, after_csr: bool) -> float | None:
        """Seconds of the layer; None where it cannot be held so.

        Args:
            after_csr: whether the layer before is held sparse.
        """
        after_csr = after_csr and self.follows
        if storage == "csr":
            alone = self.shape.csr(use, after_csr)
        else:
            alone = self.shape.dense(use) * (self.shape.after_csr if after_csr else 1.0)
        if alone is None:
            return None
        return self._factors_of(storage, after_csr)(alone)

    def _factors_of(self, storage: Storage, after_csr: bool) -> InNetwork:
        """Where no network had the layer so, those of the most similar case.

        A storage that is slower by itself is in no network. Without a factor it would look
        quicker than one that has got its own.
        """
        other: Storage = "dense" if storage == "csr" else "csr"
        nearest = [
            (held, after) for held in (storage, other) for after in (after_csr, not after_csr)
        ]
        found = (self._in_network[case] for case in nearest if case in self._in_network)
        return next(found, InNetwork())

    def rest(self, use: LayerUse, storage: Storage) -> float:
        """Seconds to the next layer."""
        if storage == "csr" and self._sparse_rest is not None:
            return self._sparse_rest
        return self._rest(use.outputs) if self._rest else 0.0

    def learn(self, number: int, layer: LayerUse, networks: Sequence[NetworkTime]) -> None:
        """Take from whole networks how the `number`-th use differs from a layer by itself."""
        pairs: dict[tuple[Storage, bool], list[tuple[float, float]]] = {}
        dense: dict[float, list[float]] = {}
        sparse: list[float] = []
        for network in networks:
            width, seconds = network.widths[number], network.layers[number]
            if seconds is None:
                continue
            use = replace(layer, inputs=width.inputs, outputs=width.outputs, density=width.density)
            after_csr = number > 0 and network.widths[number - 1].storage == "csr" and self.follows
            alone = self.seconds(use, width.storage, after_csr)
            if alone:
                pairs.setdefault((width.storage, after_csr), []).append((alone, seconds))
            if width.storage == "csr":
                sparse.append(network.rests[number])
            elif not after_csr:
                dense.setdefault(width.outputs, []).append(network.rests[number])
        self._in_network = {held: InNetwork(found) for held, found in pairs.items()}
        if dense:
            self._rest = _rest_curve(dense)
        self._sparse_rest = statistics.median(sparse) if sparse else None


def _rest_curve(found: dict[float, list[float]]) -> Curve:
    """Through the medians; through 0 where there is one width alone."""
    middle = {width: statistics.median(seconds) for width, seconds in found.items()}
    return Curve(middle if len(middle) > 1 else {0: 0.0, **middle})
