"""What an importance score is: a number for each weight, larger for weights to keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, SerializeAsAny
from torch import Tensor, nn
from torch.nn import Parameter

from sparsetrain.calibration import Calibration
from sparsetrain.candidates import Candidate
from sparsetrain.config import AnyKind, Kinded

#: Key in `state` of what `Score.observe` has returned last.
ACCUMULATED = "sparsetrain.accumulated"


#: What a score of a whole model has to be given.
Needs = Literal["none", "inputs", "loss"]
#: Among what weights compete.
Scope = Literal["row", "layer", "global"]


class Score(Kinded):
    """Base of all scores; a member is one signal, computed from a weight and what surrounds it.

    `measure` is for a network as it is, with data where the signal needs them; `of` is for a
    network in training, from what the step has left.
    """

    family: ClassVar[str] = "score"
    #: What `measure` has to be given.
    data: ClassVar[Needs] = "none"
    #: Among what `st.prune` compares weights when it is not told: a row, a layer or the model.
    scope: ClassVar[Scope] = "layer"
    #: Whether there is one number for each output channel of the layer instead of each weight.
    per_channel: ClassVar[bool] = False
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

    @property
    def title(self) -> str:
        """What errors call it."""
        return f"score {self.kind!r}"

    @property
    def needs_whole(self) -> str | None:
        """What `measure` does that sharded weights do not allow; None when it can have them."""
        return None

    @property
    def pruning_rounds(self) -> int:
        """In how many rounds, each on what the last has left, `st.prune` goes."""
        return 1

    def measure(
        self, model: nn.Module, candidates: Sequence[Candidate], calibration: Calibration
    ) -> dict[str, Tensor]:
        """Importance of each weight or channel of a whole model.

        The model is in evaluation mode meanwhile; nothing of it changes. Where ranks have batches
        of their own, what each has summed over its own is added up by `calibration.ranks`.

        Returns:
            Name of the weight -> tensor of its shape, or [outputs] for scores of channels. Of a
            sharded weight it may be whole or sharded alike.

        Raises:
            ValueError: data are missing or do not reach a weight.
        """
        generator = torch.Generator().manual_seed(calibration.seed)
        return {c.name: self.of(c.name, c.param, {}, generator) for c in candidates}

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
        raise ValueError(
            f"{self.title} cannot be computed from a training step alone: it is for "
            + ("st.score" if self.per_channel else "st.score and st.prune, which have data")
        )


def gradient_of(name: str, param: Parameter, score: str) -> Tensor:
    """The weight's gradient, or an error that says who needs it."""
    if param.grad is None:
        raise ValueError(f"score {score!r} needs the gradient of {name}: call backward() first")
    return param.grad.detach()


ScoreField = Annotated[
    SerializeAsAny[Score],
    BeforeValidator(Score.build, json_schema_input_type=Annotated[Score, AnyKind(Score)] | str),
]
