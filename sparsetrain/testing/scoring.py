"""check_score: what holds for every importance score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F

from sparsetrain.batches import called
from sparsetrain.calibration import Calibration
from sparsetrain.candidates import Candidate, choose
from sparsetrain.scores import Score
from sparsetrain.scores.base import ACCUMULATED
from sparsetrain.testing.broken import BrokenInvariant, require
from sparsetrain.testing.case import fingerprint, mark_of, require_same, seed_torch
from sparsetrain.testing.problem import SmallNet, batch
from sparsetrain.testing.report import Outcome, Report
from sparsetrain.testing.trees import first_difference

#: Looks at a score; returns why it says nothing about this one, or None.
ScoreInvariant = Callable[["ScoreCase"], str | None]
_BATCHES = 3
_SEED = 7


@dataclass(frozen=True)
class ScoreCase:
    """A score and what it is measured on.

    Attributes:
        new_model: makes the network, with the same weights each time.
        batches: of (inputs, targets).
        loss: (outputs, targets) -> scalar.
    """

    score: Score
    new_model: Callable[[], nn.Module]
    batches: list[tuple[Any, Any]]
    loss: Callable[[Any, Any], Tensor]

    def measure(self, model: nn.Module) -> dict[str, Tensor]:
        """The score of all weights."""
        calibration = Calibration(self.batches, self.loss, seed=_SEED)
        return self.score.measure(model, choose(model, None), calibration)

    @property
    def is_of_steps(self) -> bool:
        """Whether it can be had from a step of training."""
        return type(self.score).of is not Score.of

    def why_not_measured(self) -> str | None:
        """Why whole models cannot be scored; None for a score that has to be for them."""
        try:
            self.measure(self.new_model())
        except ValueError as error:
            if self.is_of_steps:
                return str(error)
            raise
        return None


def check_score(
    score: Score | str,
    *,
    model: Callable[[], nn.Module] = SmallNet,
    batches: list[tuple[Any, Any]] | None = None,
    loss: Callable[[Any, Any], Tensor] = F.cross_entropy,
) -> Report:
    """See whether a score has the right shapes, is finite, repeats and changes nothing.

    Args:
        score: a score or its name.
        model: makes the network, with the same weights each time.
        batches: of (inputs, targets); those of the default network by default.
        loss: (outputs, targets) -> scalar.

    Returns:
        What was checked, and what says nothing about this score.

    Raises:
        BrokenInvariant: an AssertionError that says which does not hold, and for which layer.
    """
    data = [batch(step) for step in range(_BATCHES)] if batches is None else batches
    case = ScoreCase(Score.build(score), model, data, loss)
    outcomes = []
    with torch.random.fork_rng(devices=[]):
        for invariant in SCORE_INVARIANTS:
            try:
                left_out = invariant(case)
            except BrokenInvariant as broken:
                broken.invariant = invariant.__name__
                raise
            outcomes.append(Outcome(invariant.__name__, left_out=left_out))
    return Report(f"score {case.score.kind!r}", tuple(outcomes))


def shapes_fit(case: ScoreCase) -> str | None:
    """A finite number for each weight, or for each output of a layer."""
    if why := case.why_not_measured():
        return why
    model = case.new_model()
    found = case.measure(model)
    require(bool(found), "there is no layer that it scores")
    for name, values in found.items():
        shape = tuple(model.get_parameter(name).shape)
        wanted = shape[:1] if case.score.per_channel else shape
        says = f"its shape is {tuple(values.shape)}, not {wanted}"
        require(tuple(values.shape) == wanted, says, layer=name)
        require(bool(values.isfinite().all()), "it is not finite", layer=name)
        require(not values.requires_grad, "it wants a gradient", layer=name)
    return None


def measuring_repeats(case: ScoreCase) -> str | None:
    """The same seed gives the same numbers, whatever the process has drawn before."""
    if why := case.why_not_measured():
        return why
    seed_torch(1)
    first = case.measure(case.new_model())
    seed_torch(2)
    before = fingerprint(torch.get_rng_state())
    second = case.measure(case.new_model())
    after = fingerprint(torch.get_rng_state())
    require(before == after, "it drew from torch's global random numbers")
    for name, values in first.items():
        same = fingerprint(values) == fingerprint(second[name])
        require(same, "measured again with the same seed it differs", layer=name)
    return None


def measuring_changes_nothing(case: ScoreCase) -> str | None:
    """The model keeps weights, buffers, gradients, modes, hooks and what wants a gradient."""
    if why := case.why_not_measured():
        return why
    model = case.new_model().train()
    for child in list(model.children())[:1]:
        child.eval()  # modes of parts have to come back, too
    before, state = mark_of(model, 0.0), _manner(model)
    case.measure(model)
    require_same(before, mark_of(model, 0.0), "measuring changed the model")
    different = first_difference(state, _manner(model))
    require(different is None, f"measuring changed {different}")
    return None


def _manner(model: nn.Module) -> dict[str, Any]:
    return {
        "gradients": [parameter.grad is None for parameter in model.parameters()],
        "what wants a gradient": [parameter.requires_grad for parameter in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
    }


def scores_round_trip(case: ScoreCase) -> str | None:
    """It comes back as it was from plain data, by its `kind`."""
    again = Score.build(case.score.model_dump(mode="json"))
    says = f"kind {case.score.kind!r} is {type(again).__name__} when it comes back from plain data"
    require(type(again) is type(case.score), says)
    require(again == case.score, "what comes back from plain data is not equal to it")
    return None


def steps_are_scored(case: ScoreCase) -> str | None:
    """In training, from what a step leaves: the weight's shape, finite, by the generator alone."""
    if not case.is_of_steps:
        return "it is for whole models"
    model = case.new_model().train()
    base = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    seen: dict[str, Tensor | None] = {}
    candidates = choose(model, None)
    for inputs, targets in case.batches:
        model.zero_grad()
        case.loss(called(model, inputs), targets).backward()  # type: ignore[no-untyped-call]
        for c in candidates:
            seen[c.name] = case.score.observe(c.name, c.param, seen.get(c.name))
        base.step()
    for candidate in candidates:
        _require_scored(case, candidate, base.state[candidate.param], seen[candidate.name])
    return None


def _require_scored(
    case: ScoreCase, candidate: Candidate, state: dict[str, Any], seen: Tensor | None
) -> None:
    name, param = candidate.name, candidate.param
    known = {**state, ACCUMULATED: seen} if case.score.accumulates else dict(state)
    before = fingerprint(param), _gradient_of(param)
    found = []
    for outside in (1, 2):
        seed_torch(outside)
        generator = torch.Generator().manual_seed(_SEED)
        found.append(case.score.of(name, param, known, generator))
    says = f"its shape is {tuple(found[0].shape)}, not {tuple(param.shape)}"
    require(found[0].shape == param.shape, says, layer=name)
    require(bool(found[0].isfinite().all()), "it is not finite", layer=name)
    require(not found[0].requires_grad, "it wants a gradient", layer=name)
    same = fingerprint(found[0]) == fingerprint(found[1])
    require(same, "the same generator gives other numbers", layer=name)
    unchanged = before == (fingerprint(param), _gradient_of(param))
    require(unchanged, "it changed the weight or its gradient", layer=name)


def _gradient_of(param: Parameter) -> bytes:
    return b"" if param.grad is None else fingerprint(param.grad)


#: Every invariant of scores, in the order in which they are checked.
SCORE_INVARIANTS: tuple[ScoreInvariant, ...] = (
    shapes_fit,
    measuring_repeats,
    measuring_changes_nothing,
    scores_round_trip,
    steps_are_scored,
)
