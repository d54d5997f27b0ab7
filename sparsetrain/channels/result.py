"""What removing channels gives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import nn

from sparsetrain.channels.architecture import Architecture
from sparsetrain.cost import flops
from sparsetrain.report.text import as_text


@dataclass(frozen=True)
class Sizes:
    """What a network costs.

    Attributes:
        parameters: numbers in all parameters.
        flops: of one sample's forward pass, a multiply-add counting 2.
    """

    parameters: int
    flops: float

    @classmethod
    def of(cls, model: nn.Module, example_inputs: Any) -> Sizes:
        """Of a model as it is."""
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return cls(parameters, flops(model, example_inputs).total)


@dataclass(frozen=True)
class ChannelResult:
    """A smaller network.

    Attributes:
        model: the network.
        layers: name of the first layer of a coupling -> its outputs before and after.
        removed: the same name -> the channels that went, numbered as before.
        before: what the network cost.
        after: what it costs.
        seconds: of a forward pass on the example inputs before and after, measured in turn; None
            where that was not asked for.
    """

    model: nn.Module
    layers: dict[str, tuple[int, int]]
    removed: dict[str, list[int]]
    before: Sizes
    after: Sizes
    seconds: tuple[float, ...] | None = None

    @property
    def architecture(self) -> Architecture:
        """The sizes, from which the network can be built again."""
        return Architecture.of(self.model)

    def save(self, path: str | Path) -> None:
        """Write the architecture file."""
        self.architecture.save(path)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the model."""
        return {
            "layers": {name: list(counts) for name, counts in self.layers.items()},
            "removed": self.removed,
            "parameters": [self.before.parameters, self.after.parameters],
            "flops": [self.before.flops, self.after.flops],
            "seconds": list(self.seconds) if self.seconds else None,
        }

    def __rich__(self) -> Table:
        table = Table("layer", "channels before", "after")
        for name, (before, after) in self.layers.items():
            table.add_row(name, f"{before:,}", f"{after:,}")
        table.add_section()
        table.add_row("parameters", f"{self.before.parameters:,}", f"{self.after.parameters:,}")
        table.add_row("FLOPs", f"{self.before.flops:,.0f}", f"{self.after.flops:,.0f}")
        if self.seconds:
            table.add_row("latency, ms", *(f"{1e3 * seconds:,.3f}" for seconds in self.seconds))
        return table

    def __str__(self) -> str:
        return as_text(self)
