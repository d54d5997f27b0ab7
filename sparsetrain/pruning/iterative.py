"""Pruning over training runs: iterative, one-shot, and lottery tickets."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparsetrain.allocation import Explicit
from sparsetrain.batches import Adapter
from sparsetrain.candidates import choose, unwrapped
from sparsetrain.curvature.losses import LossFunction
from sparsetrain.finetuning.finetune import Finetune
from sparsetrain.pruning.controls import fresh_copy, random_masks
from sparsetrain.pruning.one_shot import prune
from sparsetrain.pruning.result import PruneResult
from sparsetrain.pruning.rewinding import Snapshot, random_state, rewind, set_random_state
from sparsetrain.pruning.rounds import (
    IterativeResult,
    RoundStore,
    TrainedRound,
    packed,
    unpacked,
)
from sparsetrain.pruning.training_run import Control, TrainingRun
from sparsetrain.scores import Score
from sparsetrain.scores.base import Scope

TrainFunction = Callable[[TrainingRun], Any]
Rate = float | Mapping[str, float]


def prune_iteratively(
    train_fn: TrainFunction,
    model: nn.Module,
    score: Score | str = "magnitude",
    *,
    rounds: int,
    rate: Rate = 0.2,
    rewind_to: int | None = None,
    finetune: Finetune | None = None,
    controls: Sequence[Control] = (),
    trained: bool = False,
    folder: Path | str | None = None,
    scope: Scope | None = None,
    match: str | Sequence[str] | None = None,
    calibration: Iterable[Any] | None = None,
    loss_fn: LossFunction | None = None,
    adapter: Adapter | None = None,
    seed: int = 0,
) -> IterativeResult:
    """Train, prune a share of what is left, train again, round after round.

    With `rewind_to` these are lottery tickets (Frankle & Carbin 2019, "The lottery ticket
    hypothesis"; for steps above 0 Frankle et al. 2020, "Linear mode connectivity and the lottery
    ticket hypothesis"): after each pruning the weights, the batch normalisation, the optimizer, the
    schedule and the random generators are put back to that step of the first run. Without it each
    run begins with the trained weights (Han et al. 2015). One round is one-shot pruning.

    Args:
        train_fn: trains `run.model` (see `TrainingRun`) and returns what it measured, plain data.
            It wraps its optimizer by `run.hold`, goes through `run.steps`, and finalizes.
        score: of which the lowest weights are pruned after each run, or its name.
        rounds: prunings; there is one training run more, before the first.
        rate: share of the remaining weights that a round prunes, in (0, 1): of all weights, or by
            glob over names of weights, the first that matches (the paper takes half the rate for
            the last layer).
        rewind_to: the step; None for no rewinding.
        finetune: learning rates and number of steps of the rounds after the first, for `run.steps`
            and `run.schedule`; None trains each round like the first.
        controls: runs beside each pruned one: "fresh" with the same masks and new initial weights,
            from step 0; "random" with masks of the same counts at random places in each layer.
        trained: whether the model is trained already, so that it is pruned before the first run.
        folder: where each run's result is kept; the same call goes on where it was stopped.
        scope, match, calibration, loss_fn, adapter: as for `st.prune`.
        seed: of random scores and of the controls.

    Returns:
        Masks and metrics of every run. The model is as the last round has left it.

    Raises:
        ValueError: arguments that do not fit each other or the model, a folder of other settings,
            a training function that never reaches `rewind_to`.
    """
    model, chosen = unwrapped(model), Score.build(score)
    masks = {c.name: c.param.detach() != 0 for c in choose(model, match)}
    _check(rounds, rate, rewind_to, finetune, controls, trained, scope)
    if "fresh" in controls:
        fresh_copy(model, seed)  # raises if that cannot be done
    settings = {
        "score": chosen.model_dump(mode="json"),
        "rate": rate if isinstance(rate, float) else dict(rate),
        "rewind_to": rewind_to,
        "finetune": None if finetune is None else finetune.model_dump(mode="json"),
        "trained": trained,
        "scope": scope,
        "seed": seed,
        "weights": {name: list(mask.shape) for name, mask in masks.items()},
    }
    store = RoundStore(folder, settings)
    series = _Series(train_fn, model, store, rewind_to, finetune, seed)
    options: dict[str, Any] = {
        "scope": scope,
        "match": match,
        "calibration": calibration,
        "loss_fn": loss_fn,
        "adapter": adapter,
        "seed": seed,
    }
    done = []
    for number in range(int(trained), rounds + 1):
        ticket = series.finished(number)
        if ticket is None:
            if number:
                masks = _pruned(model, chosen, rate, number, options)
            ticket = series.train(number, masks)
        done.append(ticket)
        for control in controls if number else ():
            known = series.finished(number, control)
            done.append(known or series.train(number, ticket.masks, control))
    return IterativeResult(model, tuple(done), chosen.kind)


def _check(
    rounds: int,
    rate: Rate,
    rewind_to: int | None,
    finetune: Finetune | None,
    controls: Sequence[Control],
    trained: bool,
    scope: Scope | None,
) -> None:
    """Raise ValueError for arguments that cannot work."""
    rates = rate.values() if isinstance(rate, Mapping) else [rate]
    if rounds < 1 or not all(0 < one < 1 for one in rates):
        raise ValueError(f"rounds={rounds} must be 1 or more, and rate={rate} in (0, 1)")
    if rewind_to is not None and (rewind_to < 0 or trained):
        raise ValueError(
            f"rewind_to={rewind_to} must be 0 or more, and needs a model that is not trained yet"
        )
    if finetune is not None and rewind_to is not None:
        raise ValueError(
            f"rewind_to={rewind_to} puts the schedule back together with the weights, so that "
            "finetune has no place: give one of them"
        )
    for control in controls:
        if control not in ("fresh", "random"):
            raise ValueError(f"control {control!r} is not one of 'fresh', 'random'")
    if controls and rewind_to is None:
        raise ValueError("controls are compared with lottery tickets: give rewind_to")
    if isinstance(rate, Mapping) and scope == "global":
        raise ValueError("scope='global' leaves the densities to the scores: give one rate")


def _pruned(
    model: nn.Module, score: Score, rate: Rate, number: int, options: dict[str, Any]
) -> dict[str, Tensor]:
    """The masks of a round, by what the round before has left."""
    if isinstance(rate, Mapping):
        densities = {glob: (1 - one) ** number for glob, one in rate.items()}
        return prune(model, score, allocation=Explicit(densities=densities), **options).masks
    return prune(model, score, 1 - (1 - rate) ** number, **options).masks


@dataclass
class _Series:
    """The training runs of one call: where they begin, and what is kept of them."""

    train_fn: TrainFunction
    model: nn.Module
    store: RoundStore
    rewind_to: int | None
    finetune: Finetune | None
    seed: int

    def __post_init__(self) -> None:
        kept = self.store.load("start")
        self.start = Snapshot.take(self.model) if kept is None else Snapshot(**kept)
        if kept is None:
            self.store.save("start", self.start.to_dict())
        kept = self.store.load("rewind")
        self.target = None if kept is None else Snapshot(**kept)

    def finished(self, number: int, control: Control | None = None) -> TrainedRound | None:
        """What an earlier call has left of a run; the model is then as that run left it."""
        kept = self.store.load(_label(number, control))
        if kept is None:
            return None
        if control is None:
            self.model.load_state_dict(kept["weights"])
            set_random_state(kept["random"])
        metrics = json.loads(kept["metrics"])
        return TrainedRound(number, control, metrics, unpacked(kept["masks"]))

    def train(
        self, number: int, masks: dict[str, Tensor], control: Control | None = None
    ) -> TrainedRound:
        """Train the network itself, or a copy of it as a control."""
        run = self._run(number, masks, control)
        PruneResult(run.model, run.masks, "round").apply()
        metrics = _as_json(self.train_fn(run))
        run.require_schedule()
        if number == 0:
            self._keep_target(run)
        kept = {
            "metrics": metrics,
            "masks": packed(run.masks),
            "weights": run.model.state_dict(),
            "random": random_state(),
        }
        self.store.save(_label(number, control), kept)
        return TrainedRound(number, control, json.loads(metrics), run.masks)

    def _run(self, number: int, masks: dict[str, Tensor], control: Control | None) -> TrainingRun:
        """A run about to begin: weights and generators are where they belong."""
        own_seed = self.seed * 1_000_003 + number
        if control == "fresh":
            set_random_state(self.start.random)
            return TrainingRun(fresh_copy(self.model, own_seed), masks, number, control)
        model = self.model if control is None else copy.deepcopy(self.model)
        if control == "random":
            masks = random_masks(masks, own_seed)
        run = TrainingRun(model, masks, number, control)
        if number == 0:
            run.keep_at = self.rewind_to
            return run
        run.finetune = self.finetune
        if self.target is not None:
            rewind(self.target, model)
            run.begin, run.first_step = self.target, self.rewind_to or 0
        return run

    def _keep_target(self, run: TrainingRun) -> None:
        """Remember what later runs are rewound to."""
        if self.rewind_to is None:
            return
        if run.kept is None and self.rewind_to > 0:
            raise ValueError(
                f"train_fn did not go through run.steps as far as rewind_to={self.rewind_to}"
            )
        self.target = run.kept or self.start
        self.store.save("rewind", self.target.to_dict())


def _label(number: int, control: Control | None) -> str:
    """The name under which a run is kept."""
    return f"round-{number:02d}" + (f"-{control}" if control else "")


def _as_json(metrics: Any) -> str:
    try:
        return json.dumps(metrics)
    except TypeError as error:
        raise ValueError(f"train_fn must return plain data for JSON: {error}") from error
