"""Structured pruning: choose channels, and remove them for good."""

from sparsetrain.channels.architecture import Architecture
from sparsetrain.channels.coupling import Coupling, couplings
from sparsetrain.channels.discrimination import DiscriminationAware
from sparsetrain.channels.methods import (
    ByScore,
    ChannelMethod,
    GeometricMedian,
    LayerByLayer,
    NetworkSlimming,
    Norm,
    RandomChannels,
    Scoring,
)
from sparsetrain.channels.prune import prune
from sparsetrain.channels.rebuilding import LassoChannels, Rebuilding, ThiNet
from sparsetrain.channels.removal import silence
from sparsetrain.channels.result import ChannelResult, Sizes

__all__ = [
    "Architecture",
    "ByScore",
    "ChannelMethod",
    "ChannelResult",
    "Coupling",
    "DiscriminationAware",
    "GeometricMedian",
    "LassoChannels",
    "LayerByLayer",
    "NetworkSlimming",
    "Norm",
    "RandomChannels",
    "Rebuilding",
    "Scoring",
    "Sizes",
    "ThiNet",
    "couplings",
    "prune",
    "silence",
]
