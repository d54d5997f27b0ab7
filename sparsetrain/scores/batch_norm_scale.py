"""Scale factors of batch normalisation, one a channel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor, nn

from sparsetrain.calibration import Calibration
from sparsetrain.candidates import Candidate
from sparsetrain.scores.base import Score


class BatchNormScale(Score):
    """|gamma| of the batch normalisation that follows a layer.

    Liu et al. 2017, "Learning efficient convolutional networks through network slimming", section
    3. The one that follows is the next module in the order of definition; a layer without has no
    score.
    """

    kind: Literal["batch_norm_scale"] = "batch_norm_scale"
    per_channel: ClassVar[bool] = True

    def measure(
        self, model: nn.Module, candidates: Sequence[Candidate], calibration: Calibration
    ) -> dict[str, Tensor]:
        """[channels], for layers that a batch normalisation follows."""
        leaves = [module for module in model.modules() if not list(module.children())]
        after = dict(zip(map(id, leaves), leaves[1:], strict=False))
        found = {}
        for candidate in candidates:
            norm = after.get(id(candidate.owners[0]))
            if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or not norm.affine:
                continue
            if norm.num_features == candidate.param.shape[0]:
                found[candidate.name] = norm.weight.detach().abs()
        if not found:
            raise ValueError(
                "score 'batch_norm_scale' finds no layer with a batch normalisation right after it"
            )
        return found
