"""What a search returns: evaluated points, the front among them, a recipe for each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import nn

from sparsetrain.cost.targets import CostTarget
from sparsetrain.policies import Policy
from sparsetrain.recipe import Recipe
from sparsetrain.report.text import as_text
from sparsetrain.search.knobs import Knobs, Ratios


@dataclass(frozen=True)
class Point:
    """An evaluated network.

    Attributes:
        ratios: name of a knob -> share that is removed.
        metric: what `evaluate` returned.
        cost: by the measure of the search's target, as a share of the network without zeros.
        seconds: that pruning and evaluation took.
    """

    ratios: dict[str, float]
    metric: float
    cost: float
    seconds: float


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        method: of the search.
        knobs: of the model.
        target: what was asked for, or whose measure is the cost.
        points: every evaluated network, once each, in the order of the search.
        evaluations: how many of them this call evaluated; the others were known.
    """

    method: str
    knobs: Knobs
    target: CostTarget
    points: tuple[Point, ...]
    evaluations: int

    @property
    def best(self) -> Point:
        """The point with the highest metric; of several the cheapest."""
        return max(self.points, key=lambda point: (point.metric, -point.cost))

    @property
    def front(self) -> tuple[Point, ...]:
        """The points that none beats in both metric and cost, from cheap to dear."""
        return front(self.points)

    @property
    def seconds(self) -> float:
        """That pruning and evaluating all points took, those of earlier calls among them."""
        return sum(point.seconds for point in self.points)

    def network(self, point: Point | None = None) -> nn.Module:
        """The pruned copy of the model at a point; at the best one when None."""
        return self.knobs.network((point or self.best).ratios)

    def recipe(self, point: Point | None = None, policy: Policy | None = None) -> Recipe:
        """The ratios of a point (the best one when None) as a recipe, as `recipe_of`."""
        return recipe_of(self.knobs, (point or self.best).ratios, policy)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "method": self.method,
            "cost": self.target.kind,
            "points": [point.__dict__ for point in self.points],
            "evaluations": self.evaluations,
            "seconds": self.seconds,
        }

    def plot(self, path: str | Path) -> None:
        """Draw all points and the front."""
        from sparsetrain.report.search_plots import draw_front

        draw_front(self, Path(path))

    def __rich__(self) -> Table:
        title = f"{self.method}: the front of {len(self.points)} networks"
        table = Table("metric", f"{self.target.kind}", title=title, title_justify="left")
        for name in self.knobs.names:
            table.add_column(name, justify="right")
        for point in self.front:
            shares = (f"{ratio:.2f}" for ratio in point.ratios.values())
            table.add_row(f"{point.metric:.4f}", f"{point.cost:.3f}", *shares)
        return table

    def __str__(self) -> str:
        return as_text(self)


def front(points: Iterable[Point]) -> tuple[Point, ...]:
    """The points that no other beats in both metric and cost, from cheap to dear."""
    found: list[Point] = []
    for point in sorted(points, key=lambda point: (point.cost, -point.metric)):
        if not found or point.metric > found[-1].metric:
            found.append(point)
    return tuple(found)


def recipe_of(knobs: Knobs, ratios: Ratios, policy: Policy | None = None) -> Recipe:
    """Ratios as a recipe with a rule for each knob.

    For weights the recipe is for `SparseOptimizer`; for channels its rules are for
    `st.channels.prune(..., rules=recipe.rules)`.

    Args:
        policy: that prunes; its sparsity is replaced by those of the rules. When None a fixed mask,
            by the score of the search if that needs no data.
    """
    return Recipe(policy=policy or knobs.policy(knobs.share(ratios)), rules=knobs.rules(ratios))
