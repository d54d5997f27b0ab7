"""Every way of choosing channels, by name."""

from __future__ import annotations

from dataclasses import dataclass

import sparsetrain as st
from sparsetrain.channels import DiscriminationAware, LassoChannels, NetworkSlimming, ThiNet


@dataclass(frozen=True)
class Method:
    """A method and what it starts from.

    Attributes:
        slimming: whether the network was trained with a penalty on its scales.
    """

    label: str
    method: st.channels.ChannelMethod | st.Score | str
    slimming: bool = False


METHODS = {
    "random": Method("Random", "random"),
    "l1": Method("L1 norm", "l1"),
    "l2": Method("L2 norm", "l2"),
    "geometric_median": Method("Geometric median", "geometric_median"),
    "batch_norm_scale": Method("Batch norm scale, no penalty", "batch_norm_scale"),
    "activation_magnitude": Method("Activation magnitude", "activation_magnitude"),
    "activation_variance": Method("Activation variance", "activation_variance"),
    "taylor": Method("Taylor", "taylor"),
    "gate_fisher": Method("Gate Fisher", "gate_fisher"),
    "thinet": Method("ThiNet, matching pursuit", ThiNet()),
    "thinet_discard": Method("ThiNet, greedy discarding", ThiNet(greedy="discard")),
    "lasso": Method("LASSO", LassoChannels()),
    "dcp": Method("Discrimination-aware", DiscriminationAware(rounds=4)),
    "slimming": Method("Network Slimming", NetworkSlimming(), slimming=True),
    "slimming_fold": Method(
        "Network Slimming, shifts folded", NetworkSlimming(fold=True), slimming=True
    ),
}
