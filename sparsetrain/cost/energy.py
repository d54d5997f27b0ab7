"""Energy of a forward pass, estimated from operations and the bytes that move at each level.

The levels are those of Eyeriss (Chen et al. 2016): DRAM, a buffer, units that pass numbers on and
their registers. As in Yang et al. 2017 ("Designing energy-efficient convolutional neural networks
using energy-aware pruning") counts at each level are multiplied by the energy of one. Their search
for the best order of loops is replaced by one fixed order, so that a layer can be worked out by
hand. The documentation has the equations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.table import Table
from torch import nn

from sparsetrain.cost.hardware import Hardware
from sparsetrain.cost.layers import LayerUse, layers_used
from sparsetrain.report.text import as_text

Storage = Literal["dense", "bitmask", "runs"]

LEVELS = ("macs", "registers", "array", "buffer", "dram")


@dataclass(frozen=True, slots=True)
class LayerEnergy:
    """One use of a weight in the forward pass of one sample.

    Attributes:
        name: of the weight.
        storage: how the weight lies in DRAM: dense, non-zeros with one bit for each place, or
            non-zeros with the number of zeros before them.
        weight_bytes: its size there.
        index_bytes: what of that says where the non-zeros are.
        macs: multiply-adds that are done.
        traffic: level -> bytes read and written there: registers, array, buffer, dram.
        joules: level -> energy: the same, and macs.
    """

    name: str
    storage: Storage
    weight_bytes: float
    index_bytes: float
    macs: float
    traffic: dict[str, float]
    joules: dict[str, float]

    @property
    def total(self) -> float:
        """Joules over all levels."""
        return sum(self.joules.values())


@dataclass(frozen=True)
class EnergyReport:
    """Estimated energy of the forward pass of one sample.

    Attributes:
        hardware: whose constants were used.
        batch: samples that share a reading of the weights.
        layers: every use of a weight, in the order in which they run.
    """

    hardware: Hardware
    batch: int
    layers: tuple[LayerEnergy, ...]

    @property
    def total(self) -> float:
        """Joules of a sample."""
        return sum(layer.total for layer in self.layers)

    @property
    def levels(self) -> dict[str, float]:
        """Level -> joules: macs, registers, array, buffer, dram."""
        return {name: sum(layer.joules[name] for layer in self.layers) for name in LEVELS}

    @property
    def traffic(self) -> dict[str, float]:
        """Level -> bytes read and written there."""
        names = LEVELS[1:]
        return {name: sum(layer.traffic[name] for layer in self.layers) for name in names}

    @property
    def macs(self) -> float:
        """Multiply-adds that are done."""
        return sum(layer.macs for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "hardware": self.hardware.model_dump(),
            "batch": self.batch,
            "total": self.total,
            "levels": self.levels,
            "traffic": self.traffic,
            "macs": self.macs,
            "layers": [
                {
                    "name": layer.name,
                    "storage": layer.storage,
                    "weight_bytes": layer.weight_bytes,
                    "index_bytes": layer.index_bytes,
                    "macs": layer.macs,
                    "traffic": dict(layer.traffic),
                    "joules": dict(layer.joules),
                }
                for layer in self.layers
            ],
        }

    def __rich__(self) -> Table:
        title = f"µJ a sample, {self.hardware.name}"
        table = Table("layer", "weights", "index", *LEVELS, "total", title=title)
        for layer in self.layers:
            share = layer.index_bytes / layer.weight_bytes if layer.weight_bytes else 0.0
            values = [*layer.joules.values(), layer.total]
            table.add_row(layer.name, layer.storage, f"{share:.0%}", *map(_micro, values))
        table.add_section()
        table.add_row("all", "", "", *map(_micro, [*self.levels.values(), self.total]))
        return table

    def __str__(self) -> str:
        return as_text(self)


def energy(
    model: nn.Module, example_inputs: Any, hardware: Hardware | None = None, *, batch: int = 1
) -> EnergyReport:
    """Estimate the energy of a forward pass, per sample.

    Weights count with the zeros that they have; `Hardware.zeros` says what becomes of them.

    Args:
        example_inputs: a batch, [N, ...], or a tuple of positional or a mapping of keyword
            arguments, the first tensor of which is one. Its size does not matter.
        hardware: the machine; None takes `Hardware.eyeriss()`.
        batch: samples that are computed together and share a reading of the weights.

    Raises:
        ValueError: the model uses no Linear, Conv or attention layer on these inputs, or batch is
            less than 1.
    """
    return energy_of(layers_used(model, example_inputs), hardware, batch=batch)


def energy_of(
    layers: Sequence[LayerUse], hardware: Hardware | None = None, *, batch: int = 1
) -> EnergyReport:
    """Estimate the energy of layers, per sample; needs no network.

    Args:
        layers: in the order in which they run. The inputs of the first and the outputs of the last
            lie in DRAM.
        hardware: as for `energy`.
        batch: as for `energy`.

    Raises:
        ValueError: there is no layer, or batch is less than 1.
    """
    if not layers:
        raise ValueError("energy_of needs at least one layer")
    if batch < 1:
        raise ValueError(f"batch is the number of samples computed together, at least 1: {batch}")
    hardware = hardware or Hardware.eyeriss()
    last = len(layers) - 1
    found = (
        _layer(layer, hardware, batch, reads_dram=number == 0, writes_dram=number == last)
        for number, layer in enumerate(layers)
    )
    return EnergyReport(hardware, batch, tuple(found))


def _layer(
    layer: LayerUse, hardware: Hardware, batch: int, *, reads_dram: bool, writes_dram: bool
) -> LayerEnergy:
    skipped = hardware.zeros == "skipped"
    storage, stored, index = _stored(layer, hardware)
    weights = stored if skipped else layer.weights * hardware.weight_bits
    macs = layer.macs * (layer.density if skipped else 1.0)
    per_mac = hardware.activation_bits + hardware.weight_bits + 2 * hardware.sum_bits
    array, buffer = _array_and_buffer(layer, hardware, batch, weights)
    activations = _through_dram(layer.input_numbers, hardware, batch, always=reads_dram)
    activations += _through_dram(layer.output_numbers, hardware, batch, always=writes_dram)
    traffic = {
        "registers": macs * per_mac / 8,
        "array": array / 8,
        "buffer": buffer / 8,
        "dram": (stored / batch + activations) / 8,
    }
    joules = {
        "macs": 1e-12 * hardware.mac_pj * macs,
        "registers": 1e-12 * hardware.register_pj * traffic["registers"],
        "array": 1e-12 * hardware.array_pj * traffic["array"],
        "buffer": 1e-12 * hardware.buffer_pj * traffic["buffer"],
        "dram": 1e-12 * hardware.dram_pj * traffic["dram"],
    }
    return LayerEnergy(layer.name, storage, stored / 8, index / 8, macs, traffic, joules)


def _through_dram(numbers: float, hardware: Hardware, batch: int, *, always: bool) -> float:
    """Bits of activations that do not stay in the buffer, half of which may hold them."""
    bits = numbers * hardware.activation_bits
    return bits if always or batch * bits > 8 * hardware.buffer_bytes / 2 else 0.0


def _array_and_buffer(
    layer: LayerUse, hardware: Hardware, batch: int, weights: float
) -> tuple[float, float]:
    """Bits passed between units, and bits read from and written to the buffer, for a sample.

    Args:
        weights: bits of the weight as it lies in the buffer.
    """
    inputs = layer.input_numbers * hardware.activation_bits * _input_reads(layer, hardware)
    positions = max(1.0, batch * layer.macs / max(1, layer.weights))
    weights *= max(1.0, positions / hardware.rows) / batch
    passed = inputs * (min(hardware.columns, _outputs(layer)) - 1)
    passed += weights * (min(hardware.rows, positions) - 1)
    return passed, inputs + weights + layer.output_numbers * hardware.activation_bits


def _outputs(layer: LayerUse) -> int:
    """How many outputs an input goes into."""
    return max(1, layer.outputs // layer.groups)


def _input_reads(layer: LayerUse, hardware: Hardware) -> float:
    """How often an input is read from the buffer.

    Columns in step read an input once for all of them, unless every one has a zero there.
    """
    needed = 1.0
    if hardware.zeros == "skipped":
        any_needs: float = 1 - (1 - layer.density) ** hardware.columns
        needed = any_needs + hardware.input_reuse * (layer.density - any_needs)
    return max(1.0, needed * _outputs(layer) / hardware.columns)


def _stored(layer: LayerUse, hardware: Hardware) -> tuple[Storage, float, float]:
    """The smallest way to store a weight: its name, bits in all, bits of indices."""
    bits = hardware.weight_bits
    dense = float(layer.weights * bits)
    if hardware.zeros == "kept" or layer.density == 1:
        return "dense", dense, 0.0
    values = layer.density * dense
    mask = values + layer.weights
    entries = _entries(layer, hardware.index_bits)
    runs = entries * (bits + hardware.index_bits)
    if dense <= min(mask, runs):
        return "dense", dense, 0.0
    return ("bitmask", mask, mask - values) if mask <= runs else ("runs", runs, runs - values)


def _entries(layer: LayerUse, index_bits: int) -> float:
    """Entries in a list of non-zeros, each with the number of zeros before it.

    A run longer than the index can say takes an entry with the value 0, as in Eyeriss. Where zeros
    are independent, a share (1 - density)^(2^index_bits) of all entries is of that kind.
    """
    longest: int = 2**index_bits
    if not layer.density:
        return layer.weights / longest
    return layer.density * layer.weights / -math.expm1(longest * math.log1p(-layer.density))


def _micro(joules: float) -> str:
    return f"{1e6 * joules:,.3f}"
