"""Importance of weights, one signal a file."""

from sparsetrain.scores.activation import ActivationMagnitude, ActivationVariance
from sparsetrain.scores.base import Score, ScoreField
from sparsetrain.scores.batch_norm_scale import BatchNormScale
from sparsetrain.scores.fisher import Fisher
from sparsetrain.scores.gate_fisher import GateFisher
from sparsetrain.scores.gradient import Gradient
from sparsetrain.scores.grasp import GraSP
from sparsetrain.scores.magnitude import Magnitude
from sparsetrain.scores.momentum import Momentum
from sparsetrain.scores.movement import MovementScore
from sparsetrain.scores.optimal_brain_damage import OptimalBrainDamage
from sparsetrain.scores.optimal_brain_surgeon import OptimalBrainSurgeon
from sparsetrain.scores.random import Random
from sparsetrain.scores.snip import SNIP
from sparsetrain.scores.synflow import SynFlow
from sparsetrain.scores.taylor import Taylor
from sparsetrain.scores.wanda import Wanda

__all__ = [
    "SNIP",
    "ActivationMagnitude",
    "ActivationVariance",
    "BatchNormScale",
    "Fisher",
    "GateFisher",
    "GraSP",
    "Gradient",
    "Magnitude",
    "Momentum",
    "MovementScore",
    "OptimalBrainDamage",
    "OptimalBrainSurgeon",
    "Random",
    "Score",
    "ScoreField",
    "SynFlow",
    "Taylor",
    "Wanda",
]
