"""How masks begin and change during training, one method a file."""

from sparsetrain.policies.base import DynamicPolicy, Policy, PolicyField
from sparsetrain.policies.dynamic_network_surgery import DynamicNetworkSurgery
from sparsetrain.policies.gradual import Gradual
from sparsetrain.policies.nm_sparse import NMSparse
from sparsetrain.policies.rigl import RigL
from sparsetrain.policies.set import SET
from sparsetrain.policies.snfs import SNFS
from sparsetrain.policies.static import Static

__all__ = [
    "SET",
    "SNFS",
    "DynamicNetworkSurgery",
    "DynamicPolicy",
    "Gradual",
    "NMSparse",
    "Policy",
    "PolicyField",
    "RigL",
    "Static",
]
