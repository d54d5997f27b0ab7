"""Scale factors of batch normalisation, one a channel."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
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
        after = norms_after(model)
        norms = {c.name: after.get(id(c.owners[0])) for c in candidates}
        found = {
            name: _whole(norm.weight.detach()).abs()
            for name, norm in norms.items()
            if norm is not None and norm.affine
        }
        if not found:
            raise ValueError(
                "score 'batch_norm_scale' finds no layer with a batch normalisation right after it"
            )
        return found


def _whole(scale: Tensor) -> Tensor:
    """One number a channel is little to gather from shards."""
    return scale.full_tensor() if hasattr(scale, "full_tensor") else scale


def norms_after(model: nn.Module) -> dict[int, nn.modules.batchnorm._BatchNorm]:
    """Id of a layer -> the batch normalisation that is the next module and has its width."""
    leaves = [module for module in model.modules() if not list(module.children())]
    return {
        id(layer): norm
        for layer, norm in pairwise(leaves)
        if isinstance(norm, nn.modules.batchnorm._BatchNorm)
        and norm.num_features == getattr(layer, "out_channels", getattr(layer, "out_features", 0))
    }
