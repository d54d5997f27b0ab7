"""Knobs that are turned by single weights: a sparsity for each layer."""

from __future__ import annotations

import copy
import glob
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from sparsetrain.allocation import Explicit
from sparsetrain.batches import Adapter
from sparsetrain.calibration import Calibration
from sparsetrain.candidates import Candidate, choose, find_candidates, unwrapped
from sparsetrain.cost.layers import LayerUse
from sparsetrain.curvature.losses import LossFunction
from sparsetrain.policies import Policy, Static
from sparsetrain.pruning.one_shot import Plan
from sparsetrain.pruning.result import PruneResult
from sparsetrain.pruning.within import thinned
from sparsetrain.recipe import Rule
from sparsetrain.scores import Magnitude, Score
from sparsetrain.scoring import measured
from sparsetrain.search.knobs import (
    ByFunction,
    Knob,
    Knobs,
    PruneFunction,
    Pruning,
    Ratios,
)
from sparsetrain.structures import NM, Structure, Unstructured, parse_structure

#: What says how ratios become a network.
Prunes = Pruning | PruneFunction | Score | str


@dataclass(frozen=True)
class Weights(Pruning):
    """Set the least important weights of each layer to 0.

    Attributes:
        score: of single weights, measured once, or its name.
        structure: as for `st.prune`; n:m sets the sparsity itself and cannot be searched.
        match: glob or globs on names of weights or modules; all Linear and Conv weights that train
            when None.
        calibration, loss_fn, adapter: for scores that need data, as for `st.prune`.
        seed: of random scores.
    """

    score: Score | str = "magnitude"
    structure: Structure | str | Mapping[str, Any] = "unstructured"
    match: str | Sequence[str] | None = None
    calibration: Iterable[Any] | None = None
    loss_fn: LossFunction | None = None
    adapter: Adapter | None = None
    seed: int = 0

    def bind(self, model: nn.Module, example_inputs: Any) -> WeightKnobs:
        """Measure the score.

        Raises:
            ValueError: as `st.prune`.
        """
        return WeightKnobs(self, unwrapped(model), example_inputs)


class WeightKnobs(Knobs):
    """A sparsity for each weight."""

    adds_up: ClassVar[bool] = True

    def __init__(self, pruning: Weights, model: nn.Module, example_inputs: Any) -> None:
        self.pruning, self.score = pruning, Score.build(pruning.score)
        if self.score.per_channel or self.score.pruning_rounds > 1:
            raise ValueError(f"{self.score.title} does not score single weights in one round")
        self.structure = parse_structure(pruning.structure)
        if isinstance(self.structure, NM):
            raise ValueError("an n:m structure sets the sparsity itself: nothing is left to search")
        self.candidates = choose(model, pruning.match)
        given = Calibration(pruning.calibration, pruning.loss_fn, pruning.adapter, pruning.seed)
        self.scores = measured(model, self.score, self.candidates, given)
        self.start = {c.name: c.param.detach() != 0 for c in self.candidates}
        self._nonzeros = {name: int(mask.count_nonzero()) for name, mask in self.start.items()}
        super().__init__(model, example_inputs, [_knob(c, self.structure) for c in self.candidates])

    def masks(self, ratios: Ratios) -> dict[str, Tensor]:
        """Name -> mask, True where kept."""
        return self._plan(ratios).masks(self.scores, self.start, None)

    def network(self, ratios: Ratios) -> nn.Module:
        """A copy with zeros."""
        copied = copy.deepcopy(self.model)
        return PruneResult(copied, self.masks(ratios), self.score.kind).apply()

    def rounded(self, ratios: Ratios) -> dict[str, float]:
        """Whole weights are kept, and zeros that were there stay."""
        counts = self._plan(ratios).counts(None)
        # A layer of zeros alone counts as if it had one weight, so that its ratio is below 1.
        kept = {name: max(min(count, self._nonzeros[name]), 1) for name, count in counts.items()}
        return {knob.name: 1 - kept[knob.name] / knob.size for knob in self.knobs}

    def layers(self, ratios: Ratios) -> list[LayerUse]:
        """The model's layers with other densities."""
        return thinned(self.uses, {name: 1 - r for name, r in self.rounded(ratios).items()})

    def ranked(self, share: float) -> dict[str, float]:
        """By one threshold for the scores of all layers."""
        numel = sum(knob.size for knob in self.knobs)
        most = 1 - len(self.knobs) / numel  # a weight of each layer stays
        masks = Plan(self.candidates, "global", Unstructured(), None).masks(
            self.scores, self.start, min(share, most)
        )
        kept = {name: max(int(mask.count_nonzero()), 1) for name, mask in masks.items()}
        return {knob.name: 1 - kept[knob.name] / knob.size for knob in self.knobs}

    def policy(self, sparsity: float) -> Policy:
        """A fixed mask by the same score, or by magnitude where it needs data."""
        score = self.score if self.score.data == "none" else Magnitude()
        return Static(sparsity=sparsity, score=score, structure=self.structure)

    def rules(self, ratios: Ratios) -> tuple[Rule, ...]:
        """The ratios; other weights that a policy would take stay dense."""
        others = [c.name for c in find_candidates(self.model) if c.is_default]
        dense = [Rule(match=glob.escape(n), dense=True) for n in others if n not in self.names]
        return (*super().rules(ratios), *dense)

    def describe(self) -> dict[str, Any]:
        """The score and the structure."""
        dumped = {
            "score": self.score.model_dump(mode="json"),
            "structure": self.structure.model_dump(mode="json"),
        }
        return {"weights": dumped, "seed": self.pruning.seed}

    def _plan(self, ratios: Ratios) -> Plan:
        kept = {glob.escape(name): 1 - ratio for name, ratio in self.checked(ratios).items()}
        return Plan(self.candidates, "layer", self.structure, Explicit(densities=kept))


def _knob(candidate: Candidate, structure: Structure) -> Knob:
    modules = dict.fromkeys(name.rpartition(".")[0] for name in candidate.names)
    size = candidate.param.numel()
    step = structure.quantum(tuple(candidate.param.shape)) / size
    return Knob(candidate.name, size, tuple(modules), step)


def pruning_of(value: Prunes) -> Pruning:
    """A way of pruning from itself, a score of weights or its name, or a function of ratios.

    Raises:
        TypeError: it is none of these.
    """
    if isinstance(value, Pruning):
        return value
    if isinstance(value, Score | str):
        return Weights(Score.build(value))
    if callable(value):
        return ByFunction(value)
    raise TypeError(
        "prune must be st.search.Weights(...), Channels(...), ByFunction(...), a score or its "
        f"name, or a function of a model and ratios, not {value!r}"
    )
