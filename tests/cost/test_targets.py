"""What targets say a network costs and may cost; policies that use them are tested with those."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from channels_networks import Residual, images
from runs import SmallNet, batch
from torch import nn

import sparsetrain as st
from sparsetrain.cost.layers import layers_used
from sparsetrain.cost.targets import CostTarget, target_of
from sparsetrain.storage import save

TARGETS: list[CostTarget] = [
    st.Flops(0.5),
    st.Energy(0.5),
    st.Parameters(0.5),
    st.CompressionRate(10),
    st.ModelBytes("2MB"),
]


def sparse(seed: int = 0) -> nn.Module:
    model = SmallNet(seed)
    st.prune(model, "magnitude", 0.75, match=["conv", "hidden"]).apply()
    return model


def test_flops_by_hand() -> None:
    """SmallNet: 8 filters of 4 x 3 x 3 at 2 x 2 places, 32 x 16, 16 x 3; a multiply-add is two."""
    x = batch(0)[0]
    whole = 2 * (288 * 4 + 512 + 48)
    assert st.Flops(0.5).whole(SmallNet(), x) == st.Flops(0.5).of_model(SmallNet(), x) == whole
    left = 2 * (288 // 4 * 4 + 512 // 4 + 48)
    assert st.Flops(0.5).of_model(sparse(), x) == left
    assert st.Flops(0.5).whole(sparse(), x) == whole
    assert st.Flops(0.25).allowed(whole) == 0.25 * whole


def test_parameters_and_compression_count_what_cannot_be_pruned() -> None:
    total = 288 + 8 + 8 + 8 + 512 + 16 + 48 + 3
    kept = total - 288 * 3 // 4 - 512 * 3 // 4
    model = sparse()
    with torch.no_grad():
        model.hidden.bias.zero_()  # no zero of a weight
    assert st.Parameters(0.5).of_model(model, None) == total
    assert st.CompressionRate(10).of_model(model, None) == kept
    assert st.CompressionRate(10).whole(model, None) == total
    assert st.CompressionRate(10).allowed(total) == total / 10


def test_shared_weights_count_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert st.CompressionRate(2).of_model(model, None) == 16 + 4 + 4
    assert st.Parameters(0.5).of_model(model, None) == 16 + 4 + 4
    assert st.Flops(0.5).of_model(model, torch.randn(2, 4)) == 2 * (16 + 16)  # it runs twice


def test_bytes_are_those_of_the_file(tmp_path: Path) -> None:
    model = sparse()
    save(model, tmp_path / "model.st")
    size = (tmp_path / "model.st").stat().st_size
    assert st.ModelBytes(1).of_model(model, None) == size
    assert st.ModelBytes(1).whole(model, None) == size
    assert st.ModelBytes(77).allowed(size) == 77


def test_energy_is_that_of_the_report() -> None:
    x = batch(0)[0]
    model = sparse()
    assert st.Energy(0.5).of_model(model, x) == pytest.approx(st.cost.energy(model, x).total)
    dense = st.cost.energy(SmallNet(), x).total
    assert st.Energy(0.5).whole(model, x) == pytest.approx(dense)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.kind)
def test_lists_of_layers_say_the_same_as_models(target: CostTarget) -> None:
    model, x = Residual(), images()
    by_layers = target.of_layers(layers_used(model, x))
    if target.needs_inputs:
        assert by_layers == target.of_model(model, x)
    else:
        assert by_layers is None


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.kind)
def test_targets_are_data(target: CostTarget) -> None:
    as_data = target.model_dump(mode="json")
    assert as_data["kind"] == target.kind
    assert target_of(as_data) == target and target_of(target) is target
    assert hash(target) == hash(target_of(as_data))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("300", 300),
        ("300 B", 300),
        ("2MB", 2_000_000),
        ("2 mb", 2_000_000),
        ("1.5kB", 1500),
        ("1.5 KiB", 1536),
        ("2MiB", 2 << 20),
        ("1G", 10**9),
        ("0.5gib", 1 << 29),
        (4096, 4096),
    ],
)
def test_sizes_in_words(text: Any, expected: int) -> None:
    assert st.ModelBytes(text).size == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: st.Flops(0.0), "greater than 0"),
        (lambda: st.Flops(1.5), "less than or equal to 1"),
        (lambda: st.Flops(), "share"),
        (lambda: st.Flops(0.5, much=1), "much"),
        (lambda: st.Energy(-1.0), "greater than 0"),
        (lambda: st.Parameters(2.0), "less than or equal to 1"),
        (lambda: st.CompressionRate(0.5), "greater than or equal to 1"),
        (lambda: st.CompressionRate(float("nan")), "finite"),
        (lambda: st.ModelBytes("2 parsecs"), "'2 parsecs' is no size: write for instance"),
        (lambda: st.ModelBytes("-2MB"), "is no size"),
        (lambda: st.ModelBytes(0), "greater than 0"),
        (lambda: target_of({"kind": "flop", "share": 0.5}), "did you mean 'flops'"),
        (lambda: target_of({"share": 0.5}), "needs a field 'kind'"),
        (lambda: st.Latency(0.5, table=3), "a table is one of st.cost.latency_table or a path"),
    ],
)
def test_bad_values(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("value", [0.5, "flops", None])
def test_what_is_no_target(value: Any) -> None:
    with pytest.raises(TypeError, match=r"target must be one such as st.Flops\(0.5\)"):
        target_of(value)


def test_what_depends_on_inputs_asks_for_them() -> None:
    for target in TARGETS:
        if target.needs_inputs:
            with pytest.raises(ValueError, match="give example_inputs"):
                target.prepared(SmallNet(), None)
        else:
            assert target.prepared(SmallNet(), None) is target


def test_rounding_of_a_share_does_not_cost_a_number() -> None:
    """0.07 of 100 is a little more than 7 as floats go, 0.29 of 100 a little less than 29."""
    for share, whole in itertools.product((0.07, 0.29, 0.57, 0.1), (100, 1000, 12345600)):
        exact = round(share * whole)
        assert st.Flops(share).holds(exact, st.Flops(share).allowed(whole))
        assert not st.Flops(share).holds(exact + 1, st.Flops(share).allowed(whole))


class EachLayer(st.cost.LatencyTable):
    """A table in which an input takes a second, and a whole weight as many as it has."""

    def seconds(self, layers: Any, storages: Any = None) -> float:
        return sum(use.inputs + use.weights * use.density for use in layers)


def test_latency_is_what_the_table_says(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = SmallNet(), batch(0)[0]
    table = EachLayer(plan=None)  # type: ignore[arg-type]
    target = st.Latency(0.6, table=table)
    whole = 4 + 288 + 32 + 512 + 16 + 48
    assert target.whole(sparse(), x) == target.of_model(model, x) == whole
    assert target.of_model(sparse(), x) == 4 + 72 + 32 + 128 + 16 + 48
    assert target.allowed(whole) == pytest.approx(0.6 * whole)
    assert target.prepared(model, x) is target
    # Without a table one is measured.
    module = sys.modules["sparsetrain.cost.targets"]
    monkeypatch.setattr(module, "latency_table", lambda *given: table)
    assert st.Latency(0.6).prepared(model, x) == target
    with pytest.raises(ValueError, match="no table yet"):
        st.Latency(0.6).of_model(model, x)
    with pytest.raises(ValueError, match="give example_inputs"):
        st.Latency(0.6).prepared(model, None)
