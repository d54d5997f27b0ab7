"""How much the metric falls when one layer is pruned and all others stay as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from torch import nn

from sparsetrain.cost.targets import CostTarget
from sparsetrain.policies import Policy
from sparsetrain.recipe import Recipe
from sparsetrain.report.progress import tracked
from sparsetrain.report.text import as_text
from sparsetrain.search.budget import best_ratios
from sparsetrain.search.evaluations import Evaluate, Evaluations
from sparsetrain.search.fitting import least_that_holds
from sparsetrain.search.knobs import CostOf, Knobs
from sparsetrain.search.points import recipe_of
from sparsetrain.search.weights import Prunes, pruning_of

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def sensitivity(
    model: nn.Module,
    evaluate: Evaluate,
    ratios: Sequence[float] = RATIOS,
    *,
    prune: Prunes = "magnitude",
    example_inputs: Any = None,
    folder: Path | str | None = None,
    progress: bool = False,
) -> Sensitivity:
    """Prune one layer at a time to each ratio, and evaluate the network.

    Layers that go together (a shared weight, coupled channels) have one ratio. This is the analysis
    of Li et al. 2017, "Pruning filters for efficient convnets", section 3.2, for any way of
    pruning.

    Args:
        evaluate: takes a pruned copy of the model, and returns its metric: a number that is larger
            for better networks.
        ratios: shares to remove, in (0, 1).
        prune: `st.search.Weights(...)`, `st.search.Channels(...)`, `st.search.ByFunction(...)`, a
            score of weights or its name, or a function of a copy of the model and ratios.
        example_inputs: for channels and for costs: a tensor, a tuple of positional or a mapping of
            keyword arguments, for one call of the model.
        folder: where evaluations are kept; the same call goes on where it was stopped.
        progress: whether to show a bar.

    Raises:
        ValueError: arguments that do not fit each other or the model, a folder of another model.
    """
    levels = tuple(sorted({float(ratio) for ratio in ratios}))
    if not levels or not all(0 < ratio < 1 for ratio in levels):
        raise ValueError(f"ratios={list(levels)} must be shares to remove, in (0, 1)")
    knobs = pruning_of(prune).bind(model, example_inputs)
    evaluations = Evaluations(knobs, evaluate, folder)
    baseline = evaluations.of({}).metric
    jobs = [(name, ratio) for name in knobs.names for ratio in levels]
    found: dict[str, list[float]] = {name: [] for name in knobs.names}
    for name, ratio in tracked(jobs, "sensitivity", progress=progress):
        found[name].append(evaluations.of({name: ratio}).metric)
    metrics = {name: tuple(values) for name, values in found.items()}
    return Sensitivity(knobs, levels, baseline, metrics, evaluations.new)


@dataclass(frozen=True)
class Sensitivity:
    """The metric of networks of which one layer was pruned.

    Attributes:
        knobs: of the model.
        ratios: shares that were removed, ascending.
        baseline: the metric of the model as it is.
        metrics: name of a knob -> the metric at each ratio.
        evaluations: how many networks this call evaluated; the others were known.
    """

    knobs: Knobs
    ratios: tuple[float, ...]
    baseline: float
    metrics: dict[str, tuple[float, ...]]
    evaluations: int

    @property
    def drops(self) -> dict[str, tuple[float, ...]]:
        """Name of a knob -> how much the metric falls at each ratio."""
        return {n: tuple(self.baseline - metric for metric in m) for n, m in self.metrics.items()}

    def drop(self, name: str, ratio: float) -> float:
        """How much the metric falls, between the measured ratios in proportion.

        Ratios count as they are rounded, to whole channels say.

        A noisy metric may rise with a ratio; here it never does: a drop counts from where it was
        seen on. Beyond the largest ratio the drop is unknown, and infinite.
        """
        levels, drops = self._curves[name]
        real = self.knobs.rounded({name: ratio})[name]
        return float("inf") if real > levels[-1] + 1e-9 else float(np.interp(real, levels, drops))

    def suggest(
        self, target: CostTarget | Mapping[str, Any] | None = None, *, drop: float | None = None
    ) -> dict[str, float]:
        """A ratio for each knob: as much as goes before any layer drops more than the others.

        One threshold for the drop of every layer, as FastNAS has it (NVIDIA ModelOpt).

        Args:
            target: what the network may cost; the threshold is as low as will do.
            drop: instead, the threshold itself, in units of the metric, 0 or more.

        Raises:
            ValueError: neither or both are given, or the target cannot be met with the ratios that
                were measured.
        """
        if (target is None) == (drop is None):
            raise ValueError("give either a target or a drop")
        if target is not None:
            return least_that_holds(self.path, CostOf(target, self.knobs))
        assert drop is not None
        if not drop >= 0:
            raise ValueError(f"drop={drop} must be 0 or more")
        return {name: self._largest(name, drop) for name in self.knobs.names}

    def path(self, place: float) -> dict[str, float]:
        """Ratios for a place in [0, 1]: from no pruning over no drop to the largest drop."""
        if place <= 0.5:
            return {n: 2 * place * self._largest(n, 0.0) for n in self.knobs.names}
        worst = max(drops[-1] for _, drops in self._curves.values())
        return self.suggest(drop=(2 * place - 1) * worst)

    def optimise(self, target: CostTarget | Mapping[str, Any]) -> dict[str, float]:
        """The ratios with the lowest sum of drops among those that meet a target.

        By dynamic programming where the costs of layers add up (Frantar & Alistarh 2022, "SPDY",
        section 3.2), by descent on a Lagrangian where they depend on each other, as those of
        channels do.

        Raises:
            ValueError: the target cannot be met with the ratios that were measured.
        """
        return best_ratios(self, CostOf(target, self.knobs))

    def recipe(self, ratios: dict[str, float], policy: Policy | None = None) -> Recipe:
        """Ratios as a recipe, as `st.search.recipe_of`."""
        return recipe_of(self.knobs, ratios, policy)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "ratios": list(self.ratios),
            "baseline": self.baseline,
            "metrics": {name: list(values) for name, values in self.metrics.items()},
        }

    def plot(self, path: str | Path) -> None:
        """Draw a heat map of the drops."""
        from sparsetrain.report.search_plots import draw_sensitivity

        draw_sensitivity(self, Path(path))

    def __rich__(self) -> Table:
        title = f"metric when one layer is pruned; {self.baseline:.4f} as it is"
        table = Table("layer", title=title, title_justify="left")
        for ratio in self.ratios:
            table.add_column(f"{ratio:.0%}", justify="right")
        for name, values in self.metrics.items():
            table.add_row(name, *(f"{value:.4f}" for value in values))
        return table

    def __str__(self) -> str:
        return as_text(self)

    @cached_property
    def _curves(self) -> dict[str, tuple[list[float], list[float]]]:
        """Name of a knob -> ratios that it really had, and the largest drop so far at each."""
        return {name: self._curve(name) for name in self.knobs.names}

    def _curve(self, name: str) -> tuple[list[float], list[float]]:
        levels = [self.knobs.rounded({name: ratio})[name] for ratio in (0.0, *self.ratios)]
        drops = np.maximum.accumulate([0.0, *self.drops[name]])
        seen = dict(zip(levels, drops.tolist(), strict=True))  # the same ratio, the same network
        return list(seen), list(seen.values())

    def _largest(self, name: str, drop: float) -> float:
        """The largest ratio whose drop is no more than this."""
        levels, drops = self._curves[name]
        last = max(number for number, value in enumerate(drops) if value <= drop)
        if last == len(levels) - 1:
            return levels[-1]
        step = (drop - drops[last]) / (drops[last + 1] - drops[last])
        return levels[last] + step * (levels[last + 1] - levels[last])
