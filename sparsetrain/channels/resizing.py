"""What layers a network would have with fewer channels, without building it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from sparsetrain.channels.coupling import Coupling
from sparsetrain.cost.layers import LayerUse

#: Name of a coupling -> its channels, those that go first first.
Orders = Mapping[str, Sequence[int]]


def resized(
    layers: Sequence[LayerUse],
    found: Sequence[Coupling],
    counts: Mapping[str, int],
    orders: Orders | None = None,
) -> list[LayerUse]:
    """The layers, each with as many inputs and outputs as are left.

    Args:
        layers: of the network as it is.
        found: its couplings.
        counts: name of a coupling -> how many channels it keeps; all where it is left out.
        orders: in which channels go, where that is known. It matters where they are spread over
            several layers, as after a concatenation.
    """
    gone = _positions_gone(found, channels_gone(found, counts, orders or {}))
    return [_smaller(use, gone) for use in layers]


def channels_gone(
    found: Sequence[Coupling], counts: Mapping[str, int], orders: Orders
) -> dict[str, list[int]]:
    """Name of a coupling -> its channels that go, ascending; couplings that stay are left out."""
    gone = {}
    for coupling in found:
        losing = coupling.channels - counts.get(coupling.name, coupling.channels)
        order = orders.get(coupling.name, range(coupling.channels))
        if losing and (channels := coupling.removable(order, losing)):
            gone[coupling.name] = channels
    return gone


def _positions_gone(
    found: Sequence[Coupling], removed: Mapping[str, Sequence[int]]
) -> dict[str, set[int]]:
    """Layer and role -> positions that go, of all couplings that have some of the layer."""
    gone: dict[str, set[int]] = defaultdict(set)
    for coupling in found:
        for side in coupling.sides:
            places = [side.places[channel] for channel in removed.get(coupling.name, ())]
            gone[f"{side.role} {side.layer}"].update(*places)
    return gone


def _smaller(use: LayerUse, gone: Mapping[str, set[int]]) -> LayerUse:
    out, into, through = (len(gone[f"{role} {use.layer}"]) for role in ("out", "in", "through"))
    return replace(
        use,
        inputs=use.inputs - into - through,
        outputs=use.outputs - out - through,
        groups=use.groups - through,  # channels pass through a depthwise convolution one by one
    )
