"""Copies of layers, and layers turned sparse and dense in place."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from csr_layers import image_layer, small, state_of
from sparse_twins import pair, random_mask
from torch import Tensor, nn

from sparsetrain.storage.csr.convert import densify, follow_layout, sparsify, why_not
from sparsetrain.storage.csr.layers import SparseConv2d, SparseLinear


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


# Dense layers between sparse ones, which take over their layout.


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
