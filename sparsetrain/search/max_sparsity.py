"""The sparsest network that is still good enough."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from rich.table import Table
from torch import nn

from sparsetrain.policies import Policy
from sparsetrain.recipe import Recipe
from sparsetrain.report.progress import tracked
from sparsetrain.report.text import as_text
from sparsetrain.search.evaluations import Evaluate, Evaluations
from sparsetrain.search.knobs import Knobs, Ratios
from sparsetrain.search.points import recipe_of
from sparsetrain.search.sensitivity import Sensitivity
from sparsetrain.search.weights import Prunes, pruning_of

#: Ratios for a place in [0, 1], from no pruning to the most.
RatioPath = Callable[[float], Ratios]


@dataclass(frozen=True)
class MaxSparsity:
    """The sparsest network that was found to keep the promise.

    Attributes:
        model: the network, the very one that was evaluated last.
        ratios: name of a knob -> share that is removed.
        sparsity: share of all weights or channels that is removed.
        metric: of the network, as it was evaluated last.
        baseline: the metric of the model as it is.
        tolerance: how far the metric may be below the baseline.
        tried: (sparsity, metric) of every network, in the order of the search; the metric is a mean
            where evaluations are repeated.
        evaluations: how many were made; others were known.
        knobs: of the model.
    """

    model: nn.Module
    ratios: dict[str, float]
    sparsity: float
    metric: float
    baseline: float
    tolerance: float
    tried: tuple[tuple[float, float], ...]
    evaluations: int
    knobs: Knobs

    def recipe(self, policy: Policy | None = None) -> Recipe:
        """The ratios as a recipe, as `st.search.recipe_of`."""
        return recipe_of(self.knobs, self.ratios, policy)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        names = ("ratios", "sparsity", "metric", "baseline", "tolerance", "evaluations")
        return {name: getattr(self, name) for name in names} | {"tried": list(self.tried)}

    def __rich__(self) -> Table:
        title = f"{self.sparsity:.2%} sparse, metric {self.metric:.4f} ({self.baseline:.4f} before)"
        table = Table("layer", title=title, title_justify="left")
        table.add_column("removed", justify="right")
        for name, ratio in self.ratios.items():
            table.add_row(name, f"{ratio:.2%}")
        return table

    def __str__(self) -> str:
        return as_text(self)


def max_sparsity(
    model: nn.Module,
    evaluate: Evaluate,
    tolerance: float,
    *,
    prune: Prunes = "magnitude",
    example_inputs: Any = None,
    along: Literal["uniform", "ranked"] | Sensitivity | RatioPath = "uniform",
    most: float = 0.99,
    resolution: float = 0.005,
    repeats: int = 1,
    folder: Path | str | None = None,
    progress: bool = False,
) -> MaxSparsity:
    """Prune as much as leaves the metric within a tolerance of what it is now, by bisection.

    What is promised: the returned network itself was evaluated, after the search and once more than
    in it, and its metric is no more than `tolerance` below the baseline; so is the mean of its
    evaluations in the search. If no pruned network keeps that, the model is returned as it is. What
    is not promised: that no sparser network would do. Bisection finds one place where the metric
    crosses the tolerance; with a metric that falls and rises again, or is noisy, there are others.

    Args:
        evaluate: takes a pruned copy of the model, and returns its metric: a number that is larger
            for better networks.
        tolerance: how far the metric may fall, in its own units, 0 or more.
        prune, example_inputs: as for `st.search.sensitivity`.
        along: the path that is searched: the same ratio everywhere ("uniform"), one threshold for
            the scores of all layers ("ranked", for weights), one threshold for the drops that a
            sensitivity has measured, or a function from a place in [0, 1] to ratios.
        most: the largest share that "uniform" and "ranked" try, in (0, 1).
        resolution: of the path, at which the search ends.
        repeats: evaluations of each network, whose mean counts.
        folder: where evaluations are kept; the same call goes on where it was stopped.
        progress: whether to show a bar.

    Raises:
        ValueError: arguments that do not fit each other or the model.
    """
    if not tolerance >= 0 or not 0 < most < 1 or not 0 < resolution < 1 or repeats < 1:
        raise ValueError(
            f"tolerance={tolerance} must be 0 or more, most={most} and resolution={resolution} in "
            f"(0, 1), repeats={repeats} 1 or more"
        )
    knobs = pruning_of(prune).bind(model, example_inputs)
    at = _path(along, knobs, most)
    knobs.checked(at(1.0))  # before anything is evaluated
    looks = _Looks(Evaluations(knobs, evaluate, folder), repeats, tolerance)
    low, high, place = 0.0, 1.0, 1.0
    steps = math.ceil(math.log2(1 / resolution)) + 1
    for _ in tracked(range(steps), "search for the highest sparsity", progress=progress):
        if looks.holds(at(place)):
            low = place
        else:
            high = place
        if low == high:
            break
        place = (low + high) / 2
    return looks.sparsest()


class _Looks:
    """Networks that were looked at, and whether they kept the promise."""

    def __init__(self, evaluations: Evaluations, repeats: int, tolerance: float) -> None:
        self.evaluations, self.repeats, self.tolerance = evaluations, repeats, tolerance
        self.baseline = self._metric({})
        self.tried: list[tuple[float, float]] = []
        self.kept: list[tuple[float, dict[str, float]]] = []

    def holds(self, ratios: Ratios) -> bool:
        """Whether the metric is within the tolerance."""
        metric, share = self._metric(ratios), self.evaluations.knobs.share(ratios)
        self.tried.append((share, metric))
        if metric >= self.baseline - self.tolerance:
            kept = (share, self.evaluations.knobs.rounded(ratios))
            if kept not in self.kept:
                self.kept.append(kept)
            return True
        return False

    def sparsest(self) -> MaxSparsity:
        """The sparsest network that keeps the promise when it is evaluated once more."""
        knobs = self.evaluations.knobs
        for share, ratios in sorted(self.kept, key=lambda kept: -kept[0]):
            network, done = self.evaluations.with_network(ratios, self.repeats)
            if done.metric >= self.baseline - self.tolerance:
                return self._result(network, done.ratios, share, done.metric)
        network = copy.deepcopy(knobs.model)
        return self._result(network, knobs.rounded({}), knobs.share({}), self.baseline)

    def _metric(self, ratios: Ratios) -> float:
        looks = (self.evaluations.of(ratios, number).metric for number in range(self.repeats))
        return statistics.fmean(looks)

    def _result(
        self, network: nn.Module, ratios: dict[str, float], share: float, metric: float
    ) -> MaxSparsity:
        return MaxSparsity(
            network,
            ratios,
            share,
            metric,
            self.baseline,
            self.tolerance,
            tuple(self.tried),
            self.evaluations.new,
            self.evaluations.knobs,
        )


def _path(along: Any, knobs: Knobs, most: float) -> RatioPath:
    if isinstance(along, Sensitivity):
        return along.path
    if along == "uniform":
        return lambda place: knobs.uniform(place * most)
    if along == "ranked":
        return lambda place: knobs.ranked(place * most)
    if callable(along):
        return cast(RatioPath, along)
    raise ValueError(
        f"along={along!r} is not one of 'uniform', 'ranked', a sensitivity or a function"
    )
