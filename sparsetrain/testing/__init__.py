"""A test kit: what our own suite asks of every policy, for policies and models of your own.

`check_policy(MyPolicy(...))` trains it for a few steps again and again and raises `BrokenInvariant`
where something does not hold. `strategies` has what hypothesis needs; it is the only part that
imports hypothesis.
"""

from __future__ import annotations

from sparsetrain.testing.broken import BrokenInvariant, require
from sparsetrain.testing.case import Case, Run
from sparsetrain.testing.check import check_model, check_policy
from sparsetrain.testing.invariants import INVARIANTS, Invariant
from sparsetrain.testing.problem import OPTIMIZERS, STEPS, SmallNet, batch
from sparsetrain.testing.report import Outcome, Report
from sparsetrain.testing.scoring import SCORE_INVARIANTS, ScoreCase, ScoreInvariant, check_score

__all__ = [
    "INVARIANTS",
    "OPTIMIZERS",
    "SCORE_INVARIANTS",
    "STEPS",
    "BrokenInvariant",
    "Case",
    "Invariant",
    "Outcome",
    "Report",
    "Run",
    "ScoreCase",
    "ScoreInvariant",
    "SmallNet",
    "batch",
    "check_model",
    "check_policy",
    "check_score",
    "require",
]
