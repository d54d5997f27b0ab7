"""OWL: blocks with more outliers keep more weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from sparsetrain.allocation import Explicit
from sparsetrain.batches import Adapter
from sparsetrain.calibration import Calibration
from sparsetrain.candidates import Candidate, choose, unwrapped
from sparsetrain.pruning.sequence import stages
from sparsetrain.scores import Wanda


def owl(
    model: nn.Module,
    sparsity: float,
    calibration: Iterable[Any],
    *,
    outlier: float = 5.0,
    spread: float = 0.08,
    blocks: str | Sequence[str] = "auto",
    match: str | Sequence[str] | None = None,
    adapter: Adapter | None = None,
    progress: bool = False,
) -> Explicit:
    """Densities of the layers by the share of outliers in their block.

    Yin et al. 2024, "Outlier weighed layerwise sparsity", section 4: an outlier is a weight with
    |w| ||x|| above `outlier` times the mean of its block. Densities grow linearly with the share of
    outliers over a range of 2 `spread`, and are moved together so that all layers have the
    sparsity asked for. (The authors' mean is over blocks, whatever their size.)

    Args:
        sparsity: share of zeros over all layers, in [0, 1).
        calibration: batches of inputs, as for the score `Wanda`.
        outlier: above 0.
        spread: half the distance of the highest and lowest density, in [0, 0.5).
        blocks, match, adapter: as for `sparsegpt`.

    Returns:
        An allocation for `st.prune`, `st.sparsegpt` or a policy.

    Raises:
        ValueError: a density would not be in (0, 1]; numbers out of range; missing data.
    """
    if not 0 <= sparsity < 1 or outlier <= 0 or not 0 <= spread < 0.5:
        raise ValueError(
            f"sparsity={sparsity} must be in [0, 1), outlier={outlier} above 0 and "
            f"spread={spread} in [0, 0.5)"
        )
    model = unwrapped(model)
    candidates = choose(model, match)
    scores = Wanda().measure(
        model, candidates, Calibration(calibration, None, adapter, 0, progress)
    )
    groups = stages(model, candidates, blocks)
    shares = []
    for group in groups:
        found = torch.cat([scores[candidate.name].reshape(-1) for candidate in group])
        shares.append(float((found > outlier * found.mean()).double().mean()))
    low, high = min(shares), max(shares)
    raised = [2 * spread * (s - low) / (high - low) if high > low else 0.0 for s in shares]
    sizes = [_size(group) for group in groups]
    mean = sum(r * size for r, size in zip(raised, sizes, strict=True)) / sum(sizes)
    densities: dict[str, float] = {}
    for group, value in zip(groups, raised, strict=True):
        density = value - mean + 1 - sparsity
        if not 0 < density <= 1:
            raise ValueError(
                f"owl would give {group[0].name} a density of {density:.3f}: lower spread={spread}"
            )
        densities |= {candidate.name: density for candidate in group}
    return Explicit(densities=densities)


def _size(group: Sequence[Candidate]) -> int:
    return sum(candidate.param.numel() for candidate in group)
