"""What an importance score is: a number for each weight, larger for weights to keep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import BeforeValidator, SerializeAsAny
from torch import Tensor
from torch.nn import Parameter

from sparsetrain.config import AnyKind, Kinded

#: Key in `state` of what `Score.observe` has returned last.
ACCUMULATED = "sparsetrain.accumulated"


class Score(Kinded):
    """Base of all scores; a member is one signal, computed from a weight and what surrounds it."""

    family: ClassVar[str] = "score"
    #: Whether the score is a sum over steps, so that it has to `observe` each of them.
    accumulates: ClassVar[bool] = False

    def observe(self, name: str, param: Parameter, seen: Tensor | None) -> Tensor | None:
        """Look at a step's weight and gradient.

        Args:
            seen: what this method returned at the step before; None at the first.

        Returns:
            What to remember, of the weight's shape.
        """
        return seen

    def of(
        self,
        name: str,
        param: Parameter,
        state: Mapping[str, Any],
        generator: torch.Generator,
    ) -> Tensor:
        """Importance of each weight, of the weight's shape.

        Args:
            name: the layer, for errors.
            param: the weight; its `.grad` is the gradient of the current step, if there is one.
            state: the base optimizer's state of the weight; under `ACCUMULATED` what `observe`
                remembers.
            generator: CPU random source.

        Raises:
            ValueError: the score needs a signal that is not there.
        """
        raise NotImplementedError


def gradient_of(name: str, param: Parameter, score: str) -> Tensor:
    """The weight's gradient, or an error that says who needs it."""
    if param.grad is None:
        raise ValueError(f"score {score!r} needs the gradient of {name}: call backward() first")
    return param.grad.detach()


ScoreField = Annotated[
    SerializeAsAny[Score],
    BeforeValidator(Score.build, json_schema_input_type=Annotated[Score, AnyKind(Score)] | str),
]
