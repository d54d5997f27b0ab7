"""How masks begin and change during training, one method a file."""

from sparsetrain.policies.base import DynamicPolicy, Policy, PolicyField
from sparsetrain.policies.dynamic_network_surgery import DynamicNetworkSurgery
from sparsetrain.policies.gradual import Gradual
from sparsetrain.policies.gumbel_softmax import GumbelSoftmax
from sparsetrain.policies.hard_concrete import HardConcrete
from sparsetrain.policies.learned import LearnedPolicy
from sparsetrain.policies.movement import Movement
from sparsetrain.policies.nm_sparse import NMSparse
from sparsetrain.policies.rigl import RigL
from sparsetrain.policies.set import SET
from sparsetrain.policies.slimming import Slimming
from sparsetrain.policies.snfs import SNFS
from sparsetrain.policies.soft_threshold import SoftThreshold
from sparsetrain.policies.static import Static
from sparsetrain.policies.variational_dropout import VariationalDropout

__all__ = [
    "SET",
    "SNFS",
    "DynamicNetworkSurgery",
    "DynamicPolicy",
    "Gradual",
    "GumbelSoftmax",
    "HardConcrete",
    "LearnedPolicy",
    "Movement",
    "NMSparse",
    "Policy",
    "PolicyField",
    "RigL",
    "Slimming",
    "SoftThreshold",
    "Static",
    "VariationalDropout",
]
