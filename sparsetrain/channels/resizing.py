"""What layers a network would have with fewer channels, without building it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from sparsetrain.channels.coupling import Coupling
from sparsetrain.cost.layers import LayerUse


def resized(
    layers: Sequence[LayerUse], found: Sequence[Coupling], counts: Mapping[str, int]
) -> list[LayerUse]:
    """The layers, each with as many inputs and outputs as are left.

    Args:
        layers: of the network as it is.
        found: its couplings.
        counts: name of a coupling -> how many channels it keeps; all where it is left out.
    """
    gone = _positions_gone(found, counts)
    return [_smaller(use, gone) for use in layers]


def _positions_gone(found: Sequence[Coupling], counts: Mapping[str, int]) -> Counter[str]:
    """Layer and role -> positions that go; those of several couplings are added up."""
    gone: Counter[str] = Counter()
    for coupling in found:
        losing = coupling.channels - counts.get(coupling.name, coupling.channels)
        removed = coupling.removable(range(coupling.channels), losing) if losing else []
        for side in coupling.sides:
            gone[f"{side.role} {side.layer}"] += sum(len(side.places[c]) for c in removed)
    return gone


def _smaller(use: LayerUse, gone: Counter[str]) -> LayerUse:
    through = gone[f"through {use.layer}"]
    if through:  # depthwise
        inputs, outputs = use.inputs - through, use.outputs - through
        return replace(use, inputs=inputs, outputs=outputs, groups=use.groups - through)
    inputs = use.inputs - gone[f"in {use.layer}"]
    outputs = use.outputs - gone[f"out {use.layer}"]
    return replace(use, inputs=inputs, outputs=outputs)
