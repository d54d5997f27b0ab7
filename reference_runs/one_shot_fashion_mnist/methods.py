"""The methods that are compared: a table from name to what chooses the masks.

All look at the same images. SNIP, GraSP and SynFlow are made for networks before training; here
they prune trained ones like the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

import sparsetrain as st
from sparsetrain.scores.base import Scope

Batches = list[tuple[Tensor, Tensor]]
#: How weights compete, a table of the README each.
SCOPES: dict[Scope, str] = {
    "layer": "every layer keeps the same share",
    "global": "all weights compete",
}
LAYER: tuple[Scope, ...] = ("layer",)
GLOBAL: tuple[Scope, ...] = ("global",)
BOTH = LAYER + GLOBAL


@dataclass(frozen=True)
class Case:
    """What is to be pruned."""

    model: nn.Module
    sparsity: float
    scope: Scope
    batches: Batches
    seed: int


@dataclass(frozen=True)
class Method:
    """A way to choose masks, and the scopes that it is tried with."""

    label: str
    prune: Callable[[Case], st.PruneResult]
    scopes: tuple[Scope, ...]


def _by(score: st.Score) -> Callable[[Case], st.PruneResult]:
    def prune(case: Case) -> st.PruneResult:
        return st.prune(
            case.model,
            score,
            case.sparsity,
            scope=case.scope,
            calibration=case.batches,
            loss_fn=F.cross_entropy,
            seed=case.seed,
        )

    return prune


def _wanda(case: Case) -> st.PruneResult:
    """Row by row, as its paper has it, so that every layer keeps the same share, too."""
    return st.prune(case.model, st.Wanda(), case.sparsity, calibration=case.batches)


def _sparsegpt(case: Case) -> st.PruneResult:
    return st.sparsegpt(case.model, case.sparsity, case.batches)


def _surgeon(rounds: int) -> Callable[[Case], st.PruneResult]:
    def prune(case: Case) -> st.PruneResult:
        return st.optimal_brain_surgeon(
            case.model,
            case.sparsity,
            case.batches,
            F.cross_entropy,
            rounds=rounds,
            scope=case.scope,
        )

    return prune


_MONTE_CARLO = st.OptimalBrainDamage(curvature="monte_carlo")
#: As many products as the exact GGN takes passes, one for each class.
_HUTCHINSON = st.OptimalBrainDamage(curvature="hutchinson", probes=10)

METHODS: dict[str, Method] = {
    "random": Method("Random", _by(st.Random()), LAYER),
    "magnitude": Method("Magnitude", _by(st.Magnitude()), BOTH),
    "gradient": Method("Gradient", _by(st.Gradient()), BOTH),
    "taylor": Method("Taylor, per batch", _by(st.Taylor()), BOTH),
    "taylor_squared": Method("Taylor squared, per batch", _by(st.Taylor(squared=True)), BOTH),
    "taylor_sample": Method("Taylor, per sample", _by(st.Taylor(per="sample")), BOTH),
    # Taylor squared per sample is twice this score.
    "fisher": Method("Fisher", _by(st.Fisher()), BOTH),
    "fisher_model": Method("Fisher, model's labels", _by(st.Fisher(labels="model")), BOTH),
    "obd": Method("OBD, GGN", _by(st.OptimalBrainDamage()), BOTH),
    "obd_monte_carlo": Method("OBD, Monte Carlo", _by(_MONTE_CARLO), BOTH),
    "obd_hutchinson": Method("OBD, Hutchinson", _by(_HUTCHINSON), BOTH),
    "snip": Method("SNIP", _by(st.SNIP()), GLOBAL),
    "grasp": Method("GraSP", _by(st.GraSP()), GLOBAL),
    "synflow": Method("SynFlow", _by(st.SynFlow()), GLOBAL),
    "wanda": Method("Wanda, by row", _wanda, LAYER),
    "sparsegpt": Method("SparseGPT", _sparsegpt, LAYER),
    "obs": Method("OBS", _surgeon(1), BOTH),
    "obs_rounds": Method("OBS, 10 rounds", _surgeon(10), GLOBAL),
    "obs_masks": Method("OBS, masks alone", _by(st.OptimalBrainSurgeon()), BOTH),
}
