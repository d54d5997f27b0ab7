"""A target for one network: what it costs, and the most that it may cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from sparsetrain.cost.layers import LayerUse
from sparsetrain.cost.targets import CostTarget, target_of


@dataclass(frozen=True)
class Budget:
    """A target for one network.

    Attributes:
        target: with all that it needs to know of the network.
        whole: what the network would cost without zeros.
        allowed: the most that it may cost.
    """

    target: CostTarget
    example_inputs: Any
    whole: float
    allowed: float

    @classmethod
    def of(
        cls, target: CostTarget | Mapping[str, Any], model: nn.Module, example_inputs: Any
    ) -> Budget:
        """Look at the network as it is.

        Raises:
            TypeError, ValueError: it is no target, or it needs inputs and there are none.
        """
        prepared = target_of(target).prepared(model, example_inputs)
        whole = prepared.whole(model, example_inputs)
        return cls(prepared, example_inputs, whole, prepared.allowed(whole))

    def of_layers(self, layers: Callable[[], Sequence[LayerUse]]) -> float | None:
        """Cost of a smaller network from its layers; None where they are not enough to know."""
        return self.target.of_layers(layers()) if self.target.needs_inputs else None

    def of_model(self, model: nn.Module) -> float:
        """Cost of a smaller network as it is."""
        return self.target.of_model(model, self.example_inputs)

    def holds(self, cost: float) -> bool:
        """Whether the network may cost that."""
        return self.target.holds(cost, self.allowed)

    def out_of_reach(self, state: str, cost: float) -> str:
        """Words for an error: in which state of the network there is still how much."""
        return (
            f"target {self.target.kind!r} allows {self.allowed:,.6g} {self.target.unit}, and "
            f"{state} there are still {cost:,.6g}"
        )
