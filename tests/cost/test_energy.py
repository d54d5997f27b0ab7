"""Energy against layers worked out by hand, and what has to hold for every layer."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import nn

import sparsetrain as st
from sparsetrain.cost.energy import LEVELS
from sparsetrain.cost.layers import LayerUse, layers_used

# Powers of ten, so that the level of a number shows. A byte is 8 bits, as is every number.
PLAIN = st.cost.Hardware(
    name="by hand",
    mac_pj=1,
    register_pj=10,
    array_pj=100,
    buffer_pj=1_000,
    dram_pj=10_000,
    buffer_bytes=100,
    rows=2,
    columns=4,
    weight_bits=8,
    activation_bits=8,
    sum_bits=8,
    index_bits=2,
)
# 2 -> 8 channels, 3 x 3, 4 x 4 positions after padding: 144 weights, 2304 multiply-adds,
# 32 numbers in, 128 numbers out.
CONVOLUTION = LayerUse("w", "", "convolution", 2, 8, (3, 3), (1, 1), (1, 1), (1, 1), (4, 4), (4, 4))


def alone(layer: LayerUse, hardware: st.cost.Hardware = PLAIN, batch: int = 1) -> Any:
    """The one layer's part of a report; its inputs and outputs lie in DRAM."""
    return st.cost.energy_of([layer], hardware, batch=batch).layers[0]


def pj(found: Any) -> dict[str, float]:
    return {level: pytest.approx(1e12 * joules) for level, joules in found.joules.items()}


def test_a_dense_layer_by_hand() -> None:
    found = alone(CONVOLUTION)
    # 16 positions share 2 rows: a weight is read 8 times. 8 outputs share 4 columns: an input is
    # read twice. A weight goes on to 1 more row, an input to 3 more columns.
    weights, inputs, outputs = 144 * 8, 32 * 2, 128
    assert found.storage == "dense" and found.weight_bytes == 144 and found.index_bytes == 0
    assert found.macs == 2304
    assert found.traffic == {
        "registers": 2304 * 4,
        "array": weights * 1 + inputs * 3,
        "buffer": weights + inputs + outputs,
        "dram": 144 + 32 + 128,
    }
    assert pj(found) == {
        "macs": 2304,
        "registers": 10 * 2304 * 4,
        "array": 100 * (1152 + 192),
        "buffer": 1_000 * (1152 + 64 + 128),
        "dram": 10_000 * 304,
    }
    assert 1e12 * found.total == pytest.approx(2304 + 92_160 + 134_400 + 1_344_000 + 3_040_000)


def test_half_of_the_channels_by_hand() -> None:
    found = alone(replace(CONVOLUTION, outputs=4))
    # 72 weights, still read 8 times. 4 outputs fill the 4 columns: an input is read once.
    assert found.storage == "dense" and found.weight_bytes == 72
    assert found.macs == 1152
    assert found.traffic == {
        "registers": 1152 * 4,
        "array": 576 * 1 + 32 * 3,
        "buffer": 576 + 32 + 64,
        "dram": 72 + 32 + 64,
    }


def test_half_of_the_weights_by_hand() -> None:
    found = alone(replace(CONVOLUTION, density=0.5))
    # 72 values and a bit for each of 144 places, 72 + 18 bytes, read 8 times. Runs would be
    # larger: 72 / (1 - 1/2^4) = 76.8 entries of 10 bits, 96 bytes. An input is needed by one of 4
    # columns but in 1/2^4 of the cases: it is read 2 * 15/16 times.
    weights, inputs = 90 * 8, 32 * 2 * 15 / 16
    assert (found.storage, found.weight_bytes, found.index_bytes) == ("bitmask", 90, 18)
    assert found.macs == 1152
    assert found.traffic == {
        "registers": 1152 * 4,
        "array": weights * 1 + inputs * 3,
        "buffer": weights + inputs + 128,
        "dram": 90 + 32 + 128,
    }
    assert pj(found)["buffer"] == 1_000 * (720 + 60 + 128)


def test_structured_beats_unstructured_at_equal_products() -> None:
    structured = alone(replace(CONVOLUTION, outputs=4))
    unstructured = alone(replace(CONVOLUTION, density=0.5))
    assert structured.macs == unstructured.macs == alone(CONVOLUTION).macs / 2
    for level in ("array", "buffer", "dram"):
        assert structured.joules[level] < unstructured.joules[level]
    # DRAM: 18 bytes of indices and 64 of outputs more; buffer: the indices are read 8 times.
    assert unstructured.traffic["dram"] - structured.traffic["dram"] == 18 + 64
    assert unstructured.traffic["buffer"] - structured.traffic["buffer"] == 18 * 8 + 28 + 64


def test_what_becomes_of_zeros_is_the_hardwares_choice() -> None:
    half, dense = replace(CONVOLUTION, density=0.5), alone(CONVOLUTION)
    assert alone(half, PLAIN.model_copy(update={"zeros": "kept"})) == dense
    compressed = alone(half, PLAIN.model_copy(update={"zeros": "compressed"}))
    assert compressed.traffic == {**dense.traffic, "dram": 90 + 32 + 128}
    assert compressed.macs == dense.macs and compressed.storage == "bitmask"


def test_reuse_of_inputs_that_zeros_leave() -> None:
    def inputs_read(share: float) -> float:
        hardware = PLAIN.model_copy(update={"input_reuse": share})
        traffic = alone(replace(CONVOLUTION, density=0.5), hardware).traffic
        return float(traffic["buffer"]) - 90 * 8 - 128

    assert [inputs_read(share) for share in (0, 0.5, 1)] == [60, 46, 32]


def test_a_linear_layer_of_a_batch_by_hand() -> None:
    layer = LayerUse("w", "", "linear", 10, 8)
    one, five = alone(layer), alone(layer, batch=5)
    # Of one sample, no row has a use for another's weight. 5 samples share 2 rows: 2.5 reads.
    assert one.traffic == {"registers": 320, "array": 20 * 3, "buffer": 108, "dram": 98}
    assert five.traffic == {
        "registers": 320,
        "array": 80 * 2.5 / 5 + 20 * 3,
        "buffer": 80 * 2.5 / 5 + 20 + 8,
        "dram": 80 / 5 + 10 + 8,
    }


@pytest.mark.parametrize(
    ("density", "storage", "bits"),
    [
        (0.95, "dense", 1000 * 8),  # a mask would have 950 * 8 + 1000
        (0.5, "bitmask", 500 * 8 + 1000),
        # (3/4)^4 of the entries carry a run on. 250 / (1 - 81/256) * 10 bits > 3000.
        (0.25, "bitmask", 250 * 8 + 1000),
        # 20 / (1 - 0.98^4) entries; a mask would have 1160 bits.
        (0.02, "bitmask", 20 * 8 + 1000),
        (0.0, "bitmask", 1000),
    ],
)
def test_index_overhead_with_short_runs(density: float, storage: str, bits: float) -> None:
    found = alone(LayerUse("w", "", "linear", 20, 50, density=density))
    assert found.storage == storage and 8 * found.weight_bytes == pytest.approx(bits)
    assert 8 * found.index_bytes == pytest.approx(bits - 8_000 * density if bits < 8_000 else 0)


@pytest.mark.parametrize(
    ("density", "entries"),
    [(0.125, 125 / (1 - 0.875**32)), (0.01, 10 / (1 - 0.99**32)), (0.0, 1000 / 32)],
)
def test_index_overhead_with_long_runs(density: float, entries: float) -> None:
    found = alone(LayerUse("w", "", "linear", 20, 50, density=density), st.cost.Hardware.eyeriss())
    assert found.storage == "runs"
    assert 8 * found.weight_bytes == pytest.approx(entries * (16 + 5))
    assert 8 * found.index_bytes == pytest.approx(entries * 21 - 16_000 * density)


def test_runs_are_as_long_as_a_random_weight_has_them() -> None:
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(200_000, generator=generator) < 0.05
    places = kept.nonzero().flatten().tolist()
    gaps = [after - before - 1 for before, after in zip([-1, *places], places, strict=False)]
    entries = sum(1 + gap // 32 for gap in gaps)  # 5 bits: runs of 0 to 31, or 32 and go on
    layer = LayerUse("w", "", "linear", 400, 500, density=len(places) / 200_000)
    found = alone(layer, st.cost.Hardware.eyeriss())
    assert found.storage == "runs"
    assert 8 * found.weight_bytes / (16 + 5) == pytest.approx(entries, rel=0.005)


def test_activations_stay_in_half_of_the_buffer() -> None:
    layers = [LayerUse(str(size), "", "linear", size, size) for size in (50, 50, 51, 50)]
    found = st.cost.energy_of(layers, PLAIN).layers
    # 50 bytes stay, 51 do not; the network's own inputs and outputs never do.
    assert [layer.traffic["dram"] for layer in found] == [
        2500 + 50,
        2500,
        2601 + 102,
        2500 + 50,
    ]
    two = st.cost.energy_of(layers, PLAIN, batch=2).layers  # two samples need twice the room
    assert two[1].traffic["dram"] == 2500 / 2 + 100


def test_groups_share_no_inputs() -> None:
    depthwise = replace(CONVOLUTION, inputs=8, groups=8)
    # An input goes into one output: 1 read, no other column. 72 weights, 8 reads.
    assert alone(depthwise).traffic["buffer"] == 128 + 72 * 8 + 128
    assert alone(depthwise).traffic["array"] == 72 * 8


SIZES = some.integers(1, 64)
DENSITIES = some.floats(0.01, 1)
PROFILES = some.builds(
    lambda profile, zeros, reuse: profile.model_copy(update={"zeros": zeros, "input_reuse": reuse}),
    some.sampled_from(
        [PLAIN, st.cost.Hardware.eyeriss(), *map(st.cost.Hardware.horowitz_45nm, (32, 16, 8))]
    ),
    some.sampled_from(["kept", "compressed", "skipped"]),
    some.floats(0, 1),
)


@some.composite
def layers(draw: Any) -> LayerUse:
    inputs, outputs, density = draw(SIZES), draw(SIZES), draw(DENSITIES)
    if draw(some.booleans()):
        repeats = draw(some.sampled_from([0.5, 1.0, 7.0]))
        return LayerUse("w", "", "linear", inputs, outputs, repeats=repeats, density=density)
    kernel, size = draw(some.sampled_from([(1, 1), (3, 3)])), draw(some.integers(1, 12))
    shape, kind = (size, size), draw(some.sampled_from(["convolution", "transposed"]))
    return LayerUse(
        "w", "", kind, inputs, outputs, kernel, (), (), (), shape, shape, density=density
    )


def no_more(one: float, other: float) -> bool:
    return one <= other * (1 + 1e-9)


@given(some.lists(layers(), min_size=1, max_size=4), PROFILES, some.integers(1, 9))
def test_totals_are_sums_and_nothing_is_negative(
    used: list[LayerUse], hardware: st.cost.Hardware, batch: int
) -> None:
    report = st.cost.energy_of(used, hardware, batch=batch)
    assert report.total == pytest.approx(sum(report.levels.values()))
    assert report.total == pytest.approx(sum(layer.total for layer in report.layers))
    assert report.macs == sum(layer.macs for layer in report.layers)
    for layer in report.layers:
        numbers = [*layer.joules.values(), *layer.traffic.values(), layer.index_bytes]
        assert all(number >= 0 for number in numbers)
        assert layer.index_bytes <= layer.weight_bytes


@given(layers(), PROFILES, some.integers(1, 9), DENSITIES, SIZES, SIZES)
def test_more_weights_and_channels_cost_no_less(
    layer: LayerUse, hardware: st.cost.Hardware, batch: int, density: float, more: int, out: int
) -> None:
    found = alone(layer, hardware, batch)
    for larger in (
        replace(layer, density=max(density, layer.density)),
        replace(layer, inputs=layer.inputs + more),
        replace(layer, outputs=layer.outputs + out),
    ):
        other = alone(larger, hardware, batch)
        assert all(no_more(found.joules[level], other.joules[level]) for level in LEVELS)


@given(layers(), PROFILES, some.integers(1, 9), some.integers(2, 5), some.booleans())
def test_structured_costs_no_more_than_unstructured_at_equal_products(
    layer: LayerUse, hardware: st.cost.Hardware, batch: int, factor: int, of_outputs: bool
) -> None:
    side = "outputs" if of_outputs else "inputs"
    narrow = replace(layer, density=1.0)
    wide = replace(narrow, **{side: getattr(layer, side) * factor}, density=1 / factor)
    structured, unstructured = alone(narrow, hardware, batch), alone(wide, hardware, batch)
    if hardware.zeros == "skipped":
        assert structured.macs == pytest.approx(unstructured.macs)
    for level in LEVELS:
        assert no_more(structured.joules[level], unstructured.joules[level])


def test_a_network() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))
    x = torch.randn(3, 1, 8, 8)
    report = st.cost.energy(model, x)
    assert [layer.name for layer in report.layers] == ["0.weight", "3.weight"]
    assert report == st.cost.energy_of(layers_used(model, x[:1]), st.cost.Hardware.eyeriss())
    assert 2 * report.macs == st.cost.flops(model, x).total
    st.prune(model, "magnitude", 0.9).apply()
    pruned = st.cost.energy(model, x, batch=16)
    assert pruned.total < report.total and pruned.layers[1].storage == "runs"
    assert pruned.macs < 0.2 * report.macs


def test_a_report_is_data_and_a_table() -> None:
    report = st.cost.energy_of([replace(CONVOLUTION, density=0.5)], PLAIN, batch=2)
    data = json.loads(json.dumps(report.to_dict()))
    assert data["total"] == report.total and data["batch"] == 2
    assert data["layers"][0]["storage"] == "bitmask"
    assert st.cost.Hardware.model_validate(data["hardware"]) == PLAIN
    text = str(report)
    assert "by hand" in text and "20%" in text  # 18 of 90 bytes are indices
    assert f"{1e6 * report.total:.3f}" in text


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(ValueError, match="at least one layer"):
        st.cost.energy_of([])
    with pytest.raises(ValueError, match="batch is the number of samples"):
        st.cost.energy_of([CONVOLUTION], batch=0)
