"""st.score: importance of the weights or channels of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.batches import Adapter
from sparsetrain.calibration import Calibration
from sparsetrain.candidates import Candidate, choose, unwrapped
from sparsetrain.curvature.losses import LossFunction
from sparsetrain.distributed.averaging import Ranks, reshard
from sparsetrain.part import Part, part_of
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

    The model is in evaluation mode meanwhile; nothing of it changes. Under
    `DistributedDataParallel` or `fully_shard` every rank calls this with batches of its own, and
    gets the score of one process that has seen the batches of all.

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
        Name of the weight -> tensor of its shape, sharded as it is, or [outputs] for scores of
        channels.

    Raises:
        ValueError: data are missing, empty or do not reach a weight; a score is not finite, or it
            cannot be computed on sharded weights.
    """
    ranks = Ranks.of(model)
    model = unwrapped(model)
    calibration = Calibration(batches, loss_fn, adapter, seed, progress, ranks)
    return measured(model, Score.build(score), choose(model, match), calibration)


def measured(
    model: nn.Module, score: Score, candidates: Sequence[Candidate], calibration: Calibration
) -> dict[str, Tensor]:
    """The score of each candidate, which has to be finite."""
    if score.data != "none":
        calibration.require(score.title, loss=score.data == "loss")
    parts = {c.name: part_of(c.name, c.param) for c in candidates}
    if not all(part.is_whole for part in parts.values()):
        _require_on_shards(score, calibration.ranks)
    found = score.measure(model, candidates, calibration)
    reshard(model)
    if not score.per_channel:
        found = {name: _laid_out(parts[name], values) for name, values in found.items()}
    _check_finite(score, found, calibration.ranks)
    return found


def _require_on_shards(score: Score, ranks: Ranks) -> None:
    if score.data == "none":
        return
    why = score.needs_whole
    if why is None and not ranks.is_sharded:
        why = (
            "needs gradients or inputs, and the weights are DTensors that fully_shard has not made"
        )
    if why is not None:
        raise ValueError(
            f"{score.title} {why}, which sharded weights do not allow: call st.score or st.prune "
            "before fully_shard, on one process or under DistributedDataParallel; "
            "st.Static(masks=result.masks) holds the masks of that"
        )


def _laid_out(part: Part, values: Tensor) -> Tensor:
    """A score of a weight as the weight is."""
    if part.is_whole or hasattr(values, "placements"):
        return values
    return part.wrap(part.held(values).clone())


def _check_finite(score: Score, found: Mapping[str, Tensor], ranks: Ranks) -> None:
    bad = [int(torch.count_nonzero(~_here(values).isfinite())) for values in found.values()]
    if ranks.is_sharded:
        bad = list(ranks.totals(*bad))
    for name, count in zip(found, bad, strict=True):
        if count:
            raise ValueError(
                f"{score.title} of {name} is not finite: look for weights or gradients that "
                "are NaN or infinite"
            )


def _here(values: Tensor) -> Tensor:
    local: Tensor = values.to_local() if hasattr(values, "to_local") else values
    return local
