"""st.score: importance of the weights or channels of a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from sparsetrain.batches import Adapter
from sparsetrain.calibration import Calibration
from sparsetrain.candidates import Candidate, choose, unwrapped
from sparsetrain.curvature.losses import LossFunction
from sparsetrain.scores import Score


def score(
    model: nn.Module,
    score: Score | str,
    batches: Iterable[Any] | None = None,
    loss_fn: LossFunction | None = None,
    *,
    match: str | Sequence[str] | None = None,
    adapter: Adapter | None = None,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Importance of each weight, larger for weights to keep.

    The model is in evaluation mode meanwhile; nothing of it changes.

    Args:
        score: a score, or its name.
        batches: an iterable of (inputs, targets), or of what `adapter` makes that of; for scores
            that need data.
        loss_fn: (outputs, targets) -> scalar, for scores that need a loss.
        match: glob or globs on names of weights or modules; all Linear and Conv weights that
            train when None.
        seed: of whatever is random.
        progress: whether to show a bar.

    Returns:
        Name of the weight -> tensor of its shape, or [outputs] for scores of channels.

    Raises:
        ValueError: data are missing, empty or do not reach a weight; a score is not finite.
    """
    model = unwrapped(model)
    calibration = Calibration(batches, loss_fn, adapter, seed, progress)
    return measured(model, Score.build(score), choose(model, match), calibration)


def measured(
    model: nn.Module, score: Score, candidates: Sequence[Candidate], calibration: Calibration
) -> dict[str, Tensor]:
    """The score of each candidate, which has to be finite."""
    if score.data != "none":
        calibration.require(score.title, loss=score.data == "loss")
    found = score.measure(model, candidates, calibration)
    for name, values in found.items():
        if not values.isfinite().all():
            raise ValueError(
                f"{score.title} of {name} is not finite: look for weights or gradients that "
                "are NaN or infinite"
            )
    return found
