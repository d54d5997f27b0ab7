"""Layers that are built sparse, and their state dicts."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from csr_layers import image_layer, seeded, small
from sparse_twins import pair, random_mask
from torch import nn

from sparsetrain.storage.csr.layers import SparseLayer, SparseLinear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("density", [1.0, 0.5, 0.1, 0.009])
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_it_holds_as_many_values_as_its_density_says(
    density: float, bias: bool, dtype: torch.dtype | None
) -> None:
    layer = SparseLinear(12, 10, density, bias, dtype=dtype, generator=seeded())
    wanted = round(density * 120)
    assert layer.pattern.nnz == layer.values.numel() == wanted
    assert layer.pattern.shape == layer.weight_shape == (10, 12)
    assert layer.pattern.flat().unique().numel() == wanted
    assert [name for name, _ in layer.named_parameters()] == ["values", "bias"][: 1 + bias]
    assert layer.values.dtype == (dtype or torch.float32)
    assert all(p.dtype == layer.values.dtype for p in layer.parameters())
    assert (layer.bias is not None) == bias
    assert layer.values.all()


def test_it_is_a_linear_layer_to_whoever_asks() -> None:
    layer = small()
    assert isinstance(layer, nn.Linear) and isinstance(layer, SparseLayer)
    assert (layer.in_features, layer.out_features) == (12, 9)
    assert str(layer) == "SparseLinear(in_features=12, out_features=9, bias=True, nnz=32)"
    assert "bias=False" in str(small(bias=False))
    with pytest.raises(AttributeError):
        layer.widths  # noqa: B018


def test_values_start_within_the_bound_of_their_connections() -> None:
    layer = SparseLinear(400, 300, 0.05, generator=seeded())
    bound = 1 / math.sqrt(0.05 * 400)
    for tensor in (layer.values, layer.bias):
        largest = float(tensor.detach().abs().max())
        assert 0.9 * bound < largest <= bound
    assert abs(float(layer.values.detach().mean())) < 0.05 * bound
    # Rows that hold less than one connection on average do not start any larger than 1.
    assert (SparseLinear(400, 300, 0.001, generator=seeded()).values.abs() <= 1).all()


def test_places_are_spread_over_rows_and_columns() -> None:
    pattern = SparseLinear(300, 200, 0.1, generator=seeded()).pattern
    lengths = pattern.pointers.diff()
    assert int(lengths.min()) > 5 and int(lengths.max()) < 60
    assert int(pattern.transposed().pointers.diff().min()) > 3


def test_a_generator_decides_all_and_the_global_one_is_left_alone() -> None:
    before = torch.get_rng_state()
    one, two, other = small(), small(), SparseLinear(12, 9, 0.3, generator=seeded(1))
    assert torch.equal(torch.get_rng_state(), before)
    assert one.pattern == two.pattern and one.pattern != other.pattern
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name])
    made = []
    for _ in range(2):
        torch.manual_seed(5)
        made.append(SparseLinear(12, 9, 0.3))
    assert made[0].pattern == made[1].pattern
    assert torch.equal(made[0].values, made[1].values)


@pytest.mark.parametrize(
    "density", [0, -0.1, 1.0001, 2, 0.004, float("nan"), float("inf"), -float("inf")]
)
def test_a_density_out_of_range_is_refused(density: float) -> None:
    with pytest.raises(ValueError, match=f"density={density} of 9 x 12 weights must be in"):
        SparseLinear(12, 9, density)


def test_a_layer_that_would_never_fit_densely() -> None:
    layer = SparseLinear(1_000_000, 1_000_000, 1e-9, generator=seeded())
    assert layer.pattern.nnz == 1000
    assert layer(torch.ones(1, 1_000_000)).shape == (1, 1_000_000)


def test_reset_draws_values_anew_and_keeps_places() -> None:
    layer = small()
    pattern, values = layer.pattern, layer.values
    before = values.detach().clone()
    layer.reset_parameters(seeded(3))
    assert layer.pattern is pattern and layer.values is values
    assert not (layer.values == before).any()
    assert (layer.values.abs() <= 1 / math.sqrt(32 / 9)).all()
    again = layer.values.detach().clone()
    layer.reset_parameters(seeded(3))
    assert torch.equal(layer.values, again)
    small(bias=False).reset_parameters()


# The dense weight that is stood for.


def test_the_weight_is_a_copy() -> None:
    layer = small()
    dense = layer.weight
    assert dense.shape == (9, 12) and not dense.requires_grad
    assert int((dense != 0).sum()) == 32
    assert torch.equal(dense.view(-1)[layer.pattern.flat()], layer.values)
    before = layer(torch.eye(12))
    with torch.no_grad():
        dense.fill_(7.0)
        layer.weight.zero_()
    assert torch.equal(layer(torch.eye(12)), before)
    assert torch.allclose(before, layer.weight.t() + layer.bias)


def test_the_weight_of_a_convolution_has_its_shape() -> None:
    mask = random_mask((4, 3, 3, 3), 0.3)
    dense, sparse = pair(image_layer(), mask)
    assert sparse.weight.shape == (4, 3, 3, 3)
    assert torch.equal(sparse.weight, dense.weight)
    assert torch.equal(sparse.to_dense() != 0, mask)


# State dicts.


def test_a_state_dict_round_trip_takes_pattern_and_values() -> None:
    saved = copy.deepcopy(small(0.1).state_dict())
    assert list(saved) == ["values", "bias", "row_pointers", "columns"]
    layer = small()
    values = layer.values
    layer.load_state_dict(saved)
    assert layer.pattern.nnz == layer.values.numel() == 11
    assert layer.pattern == small(0.1).pattern
    assert layer.values is not values  # another size is another parameter
    assert layer.values.requires_grad and isinstance(layer.values, nn.Parameter)
    assert torch.equal(layer.weight, small(0.1).weight)
    x = torch.ones(3, 12)
    assert torch.equal(layer(x), small(0.1)(x))
    layer(x).sum().backward()
    assert layer.values.grad.shape == (11,)


def test_loading_as_many_values_keeps_the_parameter() -> None:
    layer, other = small(), SparseLinear(12, 9, 0.3, generator=seeded(1))
    values = layer.values
    values.grad = torch.ones_like(values)
    layer.load_state_dict(other.state_dict())
    assert layer.values is values
    assert torch.equal(layer.weight, other.weight)
    assert layer.pattern == other.pattern


def test_loading_the_same_pattern_keeps_what_it_remembers() -> None:
    layer = small()
    pattern, turned = layer.pattern, layer.pattern.transposed()
    layer.load_state_dict(copy.deepcopy(layer.state_dict()))
    assert layer.pattern is pattern and layer.pattern.transposed() is turned


def test_what_was_loaded_is_a_copy() -> None:
    saved = copy.deepcopy(small(0.1).state_dict())
    layer = small()
    layer.load_state_dict(saved)
    before = layer.weight
    for tensor in saved.values():
        tensor.zero_()
    assert torch.equal(layer.weight, before)
    assert torch.equal(layer(torch.eye(12)), before.t() + layer.bias)


def test_loading_casts_to_the_dtype_of_the_layer() -> None:
    saved = small(0.1).double().state_dict()
    assert saved["values"].dtype == torch.float64
    saved["row_pointers"], saved["columns"] = saved["row_pointers"].long(), saved["columns"].long()
    layer = small()
    layer.load_state_dict(saved)
    assert layer.values.dtype == torch.float32
    assert layer.pattern.columns.dtype == torch.int32
    assert torch.equal(layer.weight, small(0.1).weight)


def test_loading_keeps_frozen_values_frozen() -> None:
    layer = small()
    layer.values.requires_grad_(False)
    layer.load_state_dict(small(0.1).state_dict())
    assert not layer.values.requires_grad


def test_a_file_goes_through_torch_with_weights_only() -> None:
    model = nn.Sequential(small(), nn.ReLU(), nn.Linear(9, 2))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = nn.Sequential(small(0.5), nn.ReLU(), nn.Linear(9, 2))
    other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.ones(3, 12)
    assert torch.equal(model(x), other(x))


def drop(key: str) -> Any:
    return lambda saved: saved.pop(key)


def put(key: str, change: Any) -> Any:
    return lambda saved: saved.update({key: change(saved[key])})


DAMAGES = [
    pytest.param(drop("0.values"), r'Missing key\(s\).*"0\.values"', id="no values"),
    pytest.param(drop("0.columns"), r'Missing key\(s\).*"0\.columns"', id="no columns"),
    pytest.param(drop("0.row_pointers"), r'Missing.*"0\.row_pointers"', id="no pointers"),
    pytest.param(drop("0.bias"), r'Missing key\(s\).*"0\.bias"', id="no bias"),
    pytest.param(put("0.bias", lambda t: t[1:]), r"size mismatch for 0\.bias", id="bias"),
    pytest.param(put("0.values", lambda t: t[1:]), r"0\.weight: 31 values", id="short values"),
    pytest.param(put("0.values", lambda t: t[None]), r"0\.weight: .*values", id="2-D values"),
    pytest.param(put("0.columns", lambda t: t[1:]), r"0\.weight: .*31", id="short columns"),
    pytest.param(put("0.columns", lambda t: t.flip(0)), r"0\.weight: columns do not", id="order"),
    pytest.param(put("0.columns", lambda t: t + 7), r"0\.weight: columns lie outside", id="width"),
    pytest.param(put("0.columns", lambda t: t - 1), r"0\.weight: columns lie outside", id="minus"),
    pytest.param(put("0.columns", lambda t: t.float()), r"0\.weight: the columns are", id="float"),
    pytest.param(
        put("0.row_pointers", lambda t: t[:-1]), r"0\.weight: .* 9 row pointers for 9", id="rows"
    ),
    pytest.param(
        put("0.row_pointers", lambda t: t.flip(0)), r"0\.weight: .*do not rise", id="falling"
    ),
    pytest.param(
        put("0.row_pointers", lambda t: t + 1), r"0\.weight: .*do not rise from 0", id="shifted"
    ),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_a_damaged_state_is_refused_by_the_name_of_the_layer(damage: Any, message: str) -> None:
    model = nn.Sequential(small(), nn.Linear(9, 2))
    saved = copy.deepcopy(model.state_dict())
    damage(saved)
    layer, before = model[0], model[0].weight
    values, pattern = layer.values, layer.pattern
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(saved)
    assert layer.values is values and layer.pattern == pattern
    assert torch.equal(layer.weight, before)
    model(torch.ones(2, 12)).sum().backward()


def test_a_state_of_another_layer_is_refused() -> None:
    model = nn.Sequential(small())
    wider = nn.Sequential(SparseLinear(13, 9, 1.0, generator=seeded()))
    taller = nn.Sequential(SparseLinear(12, 10, 0.3, generator=seeded()))
    for other in (wider, taller):
        with pytest.raises(RuntimeError, match=r"0\.weight: "):
            model.load_state_dict(other.state_dict())
    with pytest.raises(
        RuntimeError, match=r'(?s)Missing.*"0\.values", "0\.row_pointers".*0\.weight'
    ):
        model.load_state_dict(nn.Sequential(nn.Linear(12, 9)).state_dict())
    dense = nn.Sequential(nn.Linear(12, 9))
    with pytest.raises(RuntimeError, match=r'(?s)Missing.*"0\.weight".*Unexpected.*0\.values'):
        dense.load_state_dict(model.state_dict())
    extra = model.state_dict() | {"0.more": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\).*"0\.more"'):
        model.load_state_dict(extra)


def test_without_strictness_what_is_missing_is_told_and_left() -> None:
    model = nn.Sequential(small(), nn.Linear(9, 2))
    saved = {k: v + 1 for k, v in model.state_dict().items() if not k.endswith("columns")}
    before = model[0].weight
    result = model.load_state_dict(saved, strict=False)
    assert result.missing_keys == ["0.columns"] and result.unexpected_keys == []
    assert torch.equal(model[0].weight, before)
    assert torch.equal(model[1].weight, saved["1.weight"])
    result = model.load_state_dict({}, strict=False)
    assert sorted(result.missing_keys) == sorted(model.state_dict())
