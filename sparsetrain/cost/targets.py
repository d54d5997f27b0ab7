"""What a network may cost: one way to ask, wherever a ratio is asked for."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator
from torch import nn

from sparsetrain.candidates import find_candidates
from sparsetrain.config import Kinded
from sparsetrain.cost.energy import energy_of
from sparsetrain.cost.hardware import Hardware
from sparsetrain.cost.latency_table import LatencyTable, latency_table
from sparsetrain.cost.layers import LayerUse, layers_used
from sparsetrain.storage.container import to_bytes
from sparsetrain.storage.files import contents_of

_ROUNDING = 1 + 1e-9  # a share of a count is a float
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


class CostTarget(Kinded):
    """Base of all targets."""

    family: ClassVar[str] = "target"
    #: Whether the cost depends on what goes into the network.
    needs_inputs: ClassVar[bool] = True
    unit: ClassVar[str] = ""

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)

    def prepared(self, model: nn.Module, example_inputs: Any) -> CostTarget:
        """The target with all that it needs to know of the model.

        Raises:
            ValueError: the cost depends on inputs, and there are none.
        """
        if self.needs_inputs and example_inputs is None:
            raise ValueError(f"target {self.kind!r} depends on the inputs: give example_inputs")
        return self

    @abstractmethod
    def of_model(self, model: nn.Module, example_inputs: Any) -> float:
        """What a network costs as it is, its zeros made use of."""

    def of_layers(self, layers: Sequence[LayerUse]) -> float | None:
        """The same from a list of layers; None where that is not enough to know."""
        return None

    def whole(self, model: nn.Module, example_inputs: Any) -> float:
        """What the network would cost without zeros."""
        return self.of_model(model, example_inputs)

    @abstractmethod
    def allowed(self, whole: float) -> float:
        """The most that a network may cost.

        Args:
            whole: what it would cost without zeros.
        """

    def holds(self, cost: float, allowed: float) -> bool:
        """Whether a cost is no more than what is allowed."""
        return cost <= allowed * _ROUNDING


class _ByLayers(CostTarget):
    """Base of targets whose cost follows from the list of layers."""

    share: float = Field(gt=0, le=1, description="of what the network costs without zeros")

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)

    def of_model(self, model: nn.Module, example_inputs: Any) -> float:
        cost = self.of_layers(layers_used(model, example_inputs))
        assert cost is not None
        return cost

    def whole(self, model: nn.Module, example_inputs: Any) -> float:
        dense = [replace(use, density=1.0) for use in layers_used(model, example_inputs)]
        cost = self.of_layers(dense)
        assert cost is not None
        return cost

    def allowed(self, whole: float) -> float:
        return self.share * whole


class Flops(_ByLayers):
    """Share of the FLOPs of a forward pass, in (0, 1]; those of zeros do not count."""

    kind: Literal["flops"] = "flops"
    unit: ClassVar[str] = "FLOPs a sample"

    def __init__(self, share: float | None = None, **fields: Any) -> None:
        super().__init__(share=share, **fields)

    def of_layers(self, layers: Sequence[LayerUse]) -> float:
        return sum(use.flops for use in layers)


class Latency(_ByLayers):
    """Share of the time of a forward pass on this machine, in (0, 1], as a table predicts it.

    Layers with zeros are held dense or sparse, whichever the table says is faster.
    """

    kind: Literal["latency"] = "latency"
    unit: ClassVar[str] = "seconds a batch"

    table: Any = Field(
        None, description="a latency table or the path of its file; measured when null"
    )

    def __init__(self, share: float | None = None, **fields: Any) -> None:
        super().__init__(share=share, **fields)

    @field_validator("table")
    @classmethod
    def _loaded(cls, value: Any) -> LatencyTable | None:
        if isinstance(value, str | Path):
            return LatencyTable.load(value)
        if value is not None and not isinstance(value, LatencyTable):
            raise ValueError(f"a table is one of st.cost.latency_table or a path, not {value!r}")
        return value

    def prepared(self, model: nn.Module, example_inputs: Any) -> Latency:
        super().prepared(model, example_inputs)
        if self.table is not None:
            return self
        return Latency(share=self.share, table=latency_table(model, example_inputs))

    def of_layers(self, layers: Sequence[LayerUse]) -> float:
        if self.table is None:
            raise ValueError("Latency has no table yet: give one of st.cost.latency_table")
        seconds: float = self.table.seconds(layers)
        return seconds


class Energy(_ByLayers):
    """Share of the energy of a forward pass, in (0, 1], as `st.cost.energy` estimates it."""

    kind: Literal["energy"] = "energy"
    unit: ClassVar[str] = "joules a sample"

    hardware: Hardware | None = Field(None, description="the machine; Eyeriss when null")

    def __init__(self, share: float | None = None, **fields: Any) -> None:
        super().__init__(share=share, **fields)

    def of_layers(self, layers: Sequence[LayerUse]) -> float:
        return energy_of(layers, self.hardware).total


class Parameters(CostTarget):
    """Share of the parameters, in (0, 1], zeros and those that cannot be pruned among them."""

    kind: Literal["parameters"] = "parameters"
    needs_inputs: ClassVar[bool] = False
    unit: ClassVar[str] = "parameters"

    share: float = Field(gt=0, le=1, description="of all parameters")

    def __init__(self, share: float | None = None, **fields: Any) -> None:
        super().__init__(share=share, **fields)

    def of_model(self, model: nn.Module, example_inputs: Any) -> float:
        return sum(parameter.numel() for parameter in model.parameters())

    def allowed(self, whole: float) -> float:
        return self.share * whole


class CompressionRate(CostTarget):
    """How many times fewer numbers are kept than there are parameters, 1 or more.

    Kept are all parameters but for the zeros of weights that can be sparse, so that biases and
    norms count as well.
    """

    kind: Literal["compression_rate"] = "compression_rate"
    needs_inputs: ClassVar[bool] = False
    unit: ClassVar[str] = "numbers"

    rate: float = Field(ge=1, description="parameters without zeros over numbers that are kept")

    def __init__(self, rate: float | None = None, **fields: Any) -> None:
        super().__init__(rate=rate, **fields)

    def of_model(self, model: nn.Module, example_inputs: Any) -> float:
        return sum(
            int(c.param.count_nonzero()) if c.can_be_sparse else c.param.numel()
            for c in find_candidates(model)
        )

    def whole(self, model: nn.Module, example_inputs: Any) -> float:
        return sum(parameter.numel() for parameter in model.parameters())

    def allowed(self, whole: float) -> float:
        return whole / self.rate


class ModelBytes(CostTarget):
    """The size of the file that `st.storage.save` writes: bytes, or text such as "2MB"."""

    kind: Literal["model_bytes"] = "model_bytes"
    needs_inputs: ClassVar[bool] = False
    unit: ClassVar[str] = "bytes"

    size: int = Field(gt=0, description="bytes, or text with one of kB, MB, GB, KiB, MiB, GiB")

    def __init__(self, size: int | str | None = None, **fields: Any) -> None:
        super().__init__(size=size, **fields)

    @field_validator("size", mode="before")
    @classmethod
    def _in_bytes(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        found = re.fullmatch(r"\s*(\d+\.?\d*)\s*([kmg]i?)?b?\s*", value.lower())
        if not found:
            raise ValueError(f"{value!r} is no size: write for instance 200kB, 2MB or 1.5 MiB")
        return round(float(found[1]) * _UNITS[found[2] or ""])

    def of_model(self, model: nn.Module, example_inputs: Any) -> float:
        return len(to_bytes(contents_of(model)))

    def allowed(self, whole: float) -> float:
        return self.size


def target_of(value: CostTarget | Mapping[str, Any]) -> CostTarget:
    """A target from itself or from a mapping with a `kind`.

    Raises:
        TypeError: it is neither.
        ValueError: an unknown kind or a bad field.
    """
    if not isinstance(value, CostTarget | Mapping):
        raise TypeError(f"target must be one such as st.Flops(0.5), not {value!r}")
    target: CostTarget = CostTarget.build(dict(value) if isinstance(value, Mapping) else value)
    return target
