"""Search for the ratios of all layers at once, on Optuna."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from sparsetrain.cost.targets import CostTarget, Flops
from sparsetrain.report.progress import tracked
from sparsetrain.search.evaluations import Evaluate, Evaluations
from sparsetrain.search.fitting import fitted
from sparsetrain.search.knobs import CostOf, Ratios
from sparsetrain.search.points import Point, SearchResult
from sparsetrain.search.weights import Prunes, pruning_of

Method = Literal["grid", "evolution", "tpe", "cma_es", "random"]
_STARTS = (0.3, 0.5, 0.7)  # uniform ratios that a search without a target begins with


def ratios(
    model: nn.Module,
    evaluate: Evaluate,
    *,
    prune: Prunes = "magnitude",
    example_inputs: Any = None,
    method: Method = "evolution",
    target: CostTarget | Mapping[str, Any] | None = None,
    cost: CostTarget | Mapping[str, Any] | None = None,
    trials: int = 200,
    choices: Sequence[float] | None = None,
    most: float = 0.95,
    start: Sequence[Ratios] = (),
    population: int = 20,
    folder: Path | str | None = None,
    seed: int = 0,
    progress: bool = False,
) -> SearchResult:
    """Search for ratios by evaluating whole networks.

    With a `target` every network is made to just meet it, by one factor for all its ratios, and the
    search is for the highest metric. Without one it is for both a high metric and a low cost. The
    uniform ratios are evaluated first, so that the result is never worse than they are.

    Args:
        evaluate: takes a pruned copy of the model, and returns its metric: a number that is larger
            for better networks.
        prune, example_inputs: as for `st.search.sensitivity`.
        method: "grid" (all combinations of `choices`), "evolution" (NSGA-II; Deb et al. 2002),
            "tpe" (tree-structured Parzen estimator; Bergstra et al. 2011), "cma_es" (Hansen 2016;
            needs a target), "random".
        target: what the network may cost.
        cost: without a target, the measure of cost; FLOPs when None.
        trials: networks that are tried; "grid" tries all.
        choices: ratios that a knob can have; any in [0, `most`] when None.
        start: ratios that are tried first, such as those of `Sensitivity.suggest`.
        population: of the evolution.
        folder: where evaluations are kept. The same call goes on where it was stopped, and ends as
            it would have without the stop.
        progress: whether to show a bar.

    Raises:
        ImportError: Optuna is not installed.
        ValueError: arguments that do not fit each other or the model, a target that cannot be met.
    """
    _check(method, target, cost, choices, most, trials)
    knobs = pruning_of(prune).bind(model, example_inputs)
    measure = CostOf(target or cost or Flops(1.0), knobs)
    evaluations = Evaluations(knobs, evaluate, folder)
    choices = None if choices is None else sorted(set(choices))
    study = _study(method, target is not None, population, seed)
    if method == "grid" and choices is not None:
        first, trials = _grid(knobs.names, choices), len(choices) ** len(knobs.names)
    else:
        uniform = [knobs.uniform(ratio) for ratio in ((most / 2,) if target else _STARTS)]
        first = iter([_nearest(knobs.checked(one), choices) for one in [*uniform, *start]])
    found: dict[str, Point] = {}
    for _ in tracked(range(trials), f"search by {method}", progress=progress):
        if (fixed := next(first, None)) is not None:
            study.enqueue_trial(fixed)
        trial = study.ask()
        asked = {name: _suggested(trial, name, choices, most) for name in knobs.names}
        given = asked if target is None else fitted(asked, measure, most)
        done = evaluations.of(given)
        point = Point(
            done.ratios, done.metric, measure(given) / max(measure.whole, 1e-30), done.seconds
        )
        found.setdefault(str(point.ratios), point)
        study.tell(trial, point.metric if target is not None else (point.metric, point.cost))
    return SearchResult(method, knobs, measure.target, tuple(found.values()), evaluations.new)


def _check(
    method: str,
    target: CostTarget | Mapping[str, Any] | None,
    cost: CostTarget | Mapping[str, Any] | None,
    choices: Sequence[float] | None,
    most: float,
    trials: int,
) -> None:
    if method not in ("grid", "evolution", "tpe", "cma_es", "random"):
        raise ValueError(f"method={method!r} is not one of grid, evolution, tpe, cma_es, random")
    if (choices is None and method == "grid") or (choices is not None and not choices):
        raise ValueError("method='grid' needs choices, and choices one ratio or more")
    if method == "cma_es" and (target is None or choices is not None):
        raise ValueError("method='cma_es' needs a target, and no choices")
    if target is not None and cost is not None:
        raise ValueError("give either a target or a cost to weigh up")
    if not 0 < most < 1 or not all(0 <= ratio <= most for ratio in choices or ()):
        raise ValueError(f"most={most} must be in (0, 1), and choices={choices} in [0, most]")
    if trials < 1:
        raise ValueError(f"trials={trials} must be 1 or more")


def _study(
    method: str,
    one_goal: bool,
    population: int,
    seed: int,
) -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ImportError(
            "searching for ratios needs Optuna: pip install 'sparsetrain[search]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    samplers = optuna.samplers
    sampler: Any
    if method == "evolution":
        sampler = samplers.NSGAIISampler(population_size=population, seed=seed)
    elif method == "tpe":
        sampler = samplers.TPESampler(seed=seed, multivariate=True)
    elif method == "cma_es":
        sampler = samplers.CmaEsSampler(seed=seed)
    else:  # of a grid nothing is left to it
        sampler = samplers.RandomSampler(seed=seed)
    directions: Any = ["maximize"] if one_goal else ["maximize", "minimize"]
    return optuna.create_study(sampler=sampler, directions=directions)


def _grid(names: Sequence[str], choices: Sequence[float]) -> Iterator[dict[str, float]]:
    for values in itertools.product(choices, repeat=len(names)):
        yield dict(zip(names, values, strict=True))


def _suggested(trial: Any, name: str, choices: Sequence[float] | None, most: float) -> float:
    if choices is None:
        return float(trial.suggest_float(name, 0.0, most))
    return float(trial.suggest_categorical(name, list(choices)))


def _nearest(ratios: dict[str, float], choices: Sequence[float] | None) -> dict[str, float]:
    if choices is None:
        return ratios
    return {n: min(choices, key=lambda one: abs(one - ratio)) for n, ratio in ratios.items()}
