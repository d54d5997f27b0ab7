"""Importance of weights, one signal a file."""

from sparsetrain.scores.base import Score, ScoreField
from sparsetrain.scores.gradient import Gradient
from sparsetrain.scores.magnitude import Magnitude
from sparsetrain.scores.momentum import Momentum
from sparsetrain.scores.movement import MovementScore
from sparsetrain.scores.random import Random
from sparsetrain.scores.taylor import Taylor

__all__ = [
    "Gradient",
    "Magnitude",
    "Momentum",
    "MovementScore",
    "Random",
    "Score",
    "ScoreField",
    "Taylor",
]
