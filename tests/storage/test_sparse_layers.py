"""Sparse layers as modules: made, saved, loaded, copied, and turned from dense ones and back."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from sparse_twins import pair, random_mask
from torch import Tensor, nn

from sparsetrain.storage.csr.convert import densify, follow_layout, sparsify, why_not
from sparsetrain.storage.csr.layers import SparseConv2d, SparseLayer, SparseLinear


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(density: float = 0.3, **options: Any) -> SparseLinear:
    return SparseLinear(12, 9, density, generator=seeded(), **options)


def image_layer(**options: Any) -> nn.Conv2d:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Conv2d(3, 4, 3, **options)


def state_of(module: nn.Module) -> dict[str, Any]:
    """Everything a module holds, for a comparison of before and after."""
    return {
        "class": type(module),
        "parameters": [(name, id(p), p.clone()) for name, p in module.named_parameters()],
        "attributes": sorted(module.__dict__),
    }


def unchanged(before: dict[str, Any], module: nn.Module) -> bool:
    after = state_of(module)
    return (
        before["class"] is after["class"]
        and before["attributes"] == after["attributes"]
        and [p[:2] for p in before["parameters"]] == [p[:2] for p in after["parameters"]]
        and all(
            torch.equal(a[2], b[2])
            for a, b in zip(before["parameters"], after["parameters"], strict=True)
        )
    )


# Made sparse.


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


# Copies.


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_copies_compute_the_same_and_live_their_own_lives(how: str, kind: str) -> None:
    layer: Any = small()
    x = torch.ones(3, 12)
    if kind == "conv":
        layer = sparsify(image_layer(), random_mask((4, 3, 3, 3), 0.3))
        x = torch.ones(2, 3, 5, 5)
    layer(x).sum().backward()
    if how == "deepcopy":
        again = copy.deepcopy(layer)
    elif how == "pickle":
        again = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
    assert type(again) is type(layer) and str(again) == str(layer)
    assert again.pattern == layer.pattern
    expected = layer(x)
    assert torch.equal(again(x), expected)
    with torch.no_grad():
        again.values.zero_()
    assert torch.equal(layer(x), expected)
    again(x).sum().backward()


# From dense to sparse and back.


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_layer_that_was_turned_is_the_same_object(kind: str) -> None:
    layer: Any = nn.Linear(12, 9) if kind == "linear" else image_layer(padding=1)
    shape = tuple(layer.weight.shape)
    mask, calls = random_mask(shape, 0.3), []
    handles = [
        layer.register_forward_hook(lambda *_: calls.append("forward")),
        layer.register_forward_pre_hook(lambda *_: calls.append("before")),
        layer.register_full_backward_hook(lambda *_: calls.append("backward")),
    ]
    layer.note, layer.training = "mine", False
    layer.register_buffer("count", torch.ones(3))
    layer.register_parameter("extra", nn.Parameter(torch.ones(2)))
    bias, weight = layer.bias, layer.weight.detach().clone()
    kept = torch.where(mask, weight, 0.0)

    sparse = sparsify(layer, mask)
    assert sparse is layer and type(layer) is (SparseLinear if kind == "linear" else SparseConv2d)
    assert [name for name, _ in layer.named_parameters()] == ["values", "bias", "extra"]
    assert layer.bias is bias and layer.note == "mine" and not layer.training
    assert torch.equal(layer.weight, kept)
    assert layer.values.is_leaf and layer.values.requires_grad
    assert torch.equal(layer.values, weight.view(-1)[mask.view(-1)])
    assert list(layer.state_dict()) == [
        "values",
        "bias",
        "extra",
        "count",
        "row_pointers",
        "columns",
    ]
    x = torch.ones(2, 12) if kind == "linear" else torch.ones(2, 3, 5, 5)
    x.requires_grad_()
    layer(x).sum().backward()
    assert calls == ["before", "forward", "backward"]
    y = layer(x)

    dense = densify(sparse)
    assert type(layer) is (nn.Linear if kind == "linear" else nn.Conv2d)
    assert dense is layer.weight and isinstance(dense, nn.Parameter) and dense.requires_grad
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias", "extra"]
    assert torch.equal(layer.weight, kept) and layer.bias is bias
    assert list(layer.state_dict()) == ["weight", "bias", "extra", "count"]
    assert torch.allclose(layer(x), y, atol=1e-6)
    assert layer.note == "mine" and calls.count("forward") == 3
    fresh = nn.Linear(12, 9) if kind == "linear" else image_layer(padding=1)
    assert set(layer.__dict__) == set(fresh.__dict__) | {"note"}
    for handle in handles:
        handle.remove()


def test_order_among_the_parameters_of_a_model_stays() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4, bias=False))
    before = [name.replace("weight", "values") for name, _ in model.named_parameters()]
    norm = model[1].weight
    for number in (2, 0):
        sparsify(model[number], random_mask((4, 4), 0.5))
    assert [n if n != "1.weight" else "1.values" for n, _ in model.named_parameters()] == before
    assert model[1].weight is norm


def test_frozen_layers_stay_frozen() -> None:
    layer = nn.Linear(12, 9).requires_grad_(False)
    sparse = sparsify(layer, random_mask((9, 12), 0.3))
    assert not sparse.values.requires_grad and not sparse.bias.requires_grad
    assert not densify(sparse).requires_grad


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_none_or_all_of_the_weights(share: float) -> None:
    mask = torch.full((9, 12), share > 0)
    dense, sparse = pair(nn.Linear(12, 9), mask)
    x = torch.linspace(-1, 1, 36).view(3, 12).requires_grad_()
    assert torch.allclose(sparse(x), dense(x), atol=1e-6)
    sparse(x).sum().backward()
    assert sparse.values.grad.numel() == int(mask.sum())
    again = copy.deepcopy(sparse)
    again.load_state_dict(sparse.state_dict())
    assert torch.equal(densify(sparse), dense.weight)


def test_weights_in_another_memory_format() -> None:
    layer = image_layer().to(memory_format=torch.channels_last)
    mask = random_mask((4, 3, 3, 3), 0.3)
    weight = layer.weight.detach().clone()
    for m in (mask, mask.contiguous(memory_format=torch.channels_last)):
        sparse = sparsify(copy.deepcopy(layer), m)
        assert torch.equal(sparse.weight, torch.where(mask, weight, 0.0))


class Mine(nn.Linear):
    pass


def with_weight_norm() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))


def with_spectral_norm_of_old() -> nn.Module:
    return nn.utils.spectral_norm(nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Conv1d(3, 4, 3), "Conv1d has no sparse form"),
        (lambda: Mine(4, 4), "Mine has no sparse form"),
        (lambda: nn.Bilinear(4, 4, 4), "Bilinear has no sparse form"),
        (with_weight_norm, "ParametrizedLinear has no sparse form"),
        (with_spectral_norm_of_old, "computed from other parameters"),
        (lambda: nn.Conv2d(4, 4, 3, groups=2), "grouped convolution"),
        (lambda: nn.Conv2d(4, 4, 3, padding="same"), "padding is not a number of zeros"),
        (
            lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
            "padding is not a number of zeros",
        ),
        (lambda: nn.Linear(4, 4).bfloat16(), "dtype is bfloat16, not float32 or float64"),
        (lambda: nn.Linear(4, 4).half(), "dtype is float16, not float32 or float64"),
        (lambda: nn.Linear(4, 4, device="meta"), "it is on meta"),
        (lambda: SparseLinear(4, 4, 0.5), "SparseLinear has no sparse form"),
    ],
)
def test_a_layer_without_a_sparse_form_says_why_and_stays_as_it_was(make: Any, reason: str) -> None:
    layer = make()
    meta = any(p.is_meta for p in layer.parameters())
    before = None if meta else state_of(layer)
    assert reason in why_not(layer)
    with pytest.raises(ValueError, match=reason):
        sparsify(layer, torch.ones(4, 4, dtype=torch.bool))
    assert before is None or unchanged(before, layer)


@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 3), lambda: nn.Linear(4, 3).double()])
def test_layers_with_a_sparse_form(make: Any) -> None:
    assert why_not(make()) == ""
    assert why_not(image_layer(padding=(1, 2), stride=2, dilation=3, bias=False)) == ""


def test_a_mask_of_another_shape_changes_nothing() -> None:
    layer = nn.Linear(12, 9)
    before = state_of(layer)
    wrong: Tensor = torch.ones(9, 13, dtype=torch.bool)
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        sparsify(layer, wrong)
    assert unchanged(before, layer)


# Dense layers between sparse ones, which take over their layout.

LAYOUTS = {
    "rows": lambda: torch.randn(5, 12),
    "features": lambda: torch.randn(12, 5).t(),
    "one": lambda: torch.randn(12),
    "one of a batch": lambda: torch.randn(1, 12),
    "none": lambda: torch.randn(12, 0).t(),
    "sequences": lambda: torch.randn(12, 3, 4).permute(1, 2, 0),
    "turned sequences": lambda: torch.randn(12, 4, 3).permute(2, 1, 0),
    "slice": lambda: torch.randn(12, 10).t()[::2],
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_dense_layer_that_follows_computes_what_it_did(layout: str, bias: bool) -> None:
    layer = nn.Linear(12, 9, bias=bias)
    x = LAYOUTS[layout]()
    results = []
    for on in (False, True):
        follow_layout([layer], on=on)
        layer.zero_grad()
        inputs = x.clone(memory_format=torch.preserve_format).requires_grad_()
        out = layer(inputs)
        out.square().sum().backward()
        results.append((out, inputs.grad, layer.weight.grad))
    for mine, wanted in zip(*results, strict=True):
        assert mine.shape == wanted.shape and mine.dtype == wanted.dtype
        assert torch.allclose(mine, wanted, rtol=1e-5, atol=1e-5)
    follow_layout([layer], on=False)
    assert type(layer) is nn.Linear


@pytest.mark.parametrize("layout", ["rows", "features"])
def test_within_autocast_it_gives_the_dtype_that_it_gave(layout: str) -> None:
    layer, x = nn.Linear(12, 9), LAYOUTS[layout]()
    dtypes = []
    for on in (False, True):
        follow_layout([layer], on=on)
        with torch.autocast("cpu", torch.bfloat16):
            dtypes.append(layer(x).dtype)
    assert dtypes[0] == dtypes[1]


def test_only_plain_dense_layers_follow() -> None:
    modules = [nn.Linear(4, 4), Mine(4, 4), with_weight_norm(), SparseLinear(4, 4, 0.5)]
    kinds = [type(m) for m in modules]
    follow_layout([*modules, nn.ReLU()], on=True)
    assert [type(m) is kind for m, kind in zip(modules, kinds, strict=True)] == [
        False,
        True,
        True,
        True,
    ]
    assert isinstance(modules[0], nn.Linear)
    follow_layout(modules, on=False)
    assert [type(m) for m in modules] == kinds


def test_a_layer_that_follows_can_become_sparse_and_is_plain_when_it_comes_back() -> None:
    layer = nn.Linear(12, 9)
    follow_layout([layer], on=True)
    assert why_not(layer) == ""
    sparse = sparsify(layer, random_mask((9, 12), 0.3))
    densify(sparse)
    assert type(layer) is nn.Linear
