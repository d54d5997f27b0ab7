"""Static: a mask chosen once and held."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from sparsetrain.policies.base import Policy, scored_masks
from sparsetrain.policies.group import TargetGroup
from sparsetrain.scores import Random, ScoreField


class Static(Policy):
    """Choose a mask at the start, random or by a score, and train with it (the field's baseline).

    With `Magnitude()` on a trained network this is one-shot pruning and fine-tuning
    (Han et al. 2015); with random masks it is the control that every method has to beat.
    """

    kind: Literal["static"] = "static"

    score: ScoreField = Field(default_factory=Random, description="what the mask is chosen by")

    def initial_masks(self, group: TargetGroup) -> dict[str, Tensor]:
        """The weights with the highest scores."""
        return scored_masks(self, group, self.score)
