"""Compressed copies compute what the model computes, and the model stays as it was."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import Tensor, nn

import sparsetrain as st
from sparsetrain.storage import SparseConv2d, SparseLinear


def make_zeros(model: nn.Module, sparsity: float = 0.9) -> nn.Module:
    """Zeros at random in every matrix, exactly that many."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                places = torch.randperm(parameter.numel(), generator=generator)
                parameter.view(-1)[places[: round(sparsity * parameter.numel())]] = 0
    return model


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 8))


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, (3, 5), stride=2, padding=(1, 2), dilation=(2, 1), bias=False),
        nn.Conv2d(12, 6, 1, stride=2),
        nn.Flatten(),
        nn.Linear(36, 5),
    )


def close(model: nn.Module, compressed: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        expected = model(x)
        assert expected.abs().sum() > 0
        torch.testing.assert_close(compressed(x), expected)


@pytest.mark.parametrize("shape", [(1, 30), (7, 30), (33, 30), (2, 3, 30), (30,), (0, 30)])
def test_linear_outputs(shape: tuple[int, ...]) -> None:
    model = make_zeros(mlp())
    compressed = st.compress(model)
    x = torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(compressed(x), model(x))


@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_convolution_outputs(batch: int, dtype: torch.dtype) -> None:
    model = make_zeros(convolutions()).to(dtype).eval()
    compressed = st.compress(model)
    assert sum(isinstance(layer, SparseConv2d) for layer in compressed) == 3
    close(model, compressed, torch.randn(batch, 3, 9, 9, dtype=dtype))


@given(
    sparsity=some.floats(0, 1),
    size=some.tuples(some.integers(1, 12), some.integers(1, 12)),
    batch=some.integers(1, 9),
)
def test_any_density(sparsity: float, size: tuple[int, int], batch: int) -> None:
    model = make_zeros(nn.Sequential(nn.Linear(*size)), sparsity)
    compressed = st.compress(model, min_sparsity=0)
    assert compressed[0].pattern.nnz == int(torch.count_nonzero(model[0].weight))
    x = torch.randn(batch, size[0])
    torch.testing.assert_close(compressed(x), model(x))


@pytest.mark.parametrize("batch", [1, 12])
@pytest.mark.parametrize("kernels", ["best", "torch"])
@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Linear(30, 8), (30,)), (nn.Conv2d(3, 4, 3), (3, 7, 7))], ids=str
)
def test_a_weight_of_zeros_alone_leaves_the_bias(
    layer: nn.Module, shape: tuple[int, ...], kernels: Any, batch: int
) -> None:
    with torch.no_grad():
        layer.weight.zero_()
    compressed = st.compress(layer)
    assert compressed.pattern.nnz == 0
    x = torch.randn(batch, *shape, requires_grad=True)
    with st.storage.using(kernels):
        close(layer, compressed, x)
        compressed(x).sum().backward()
    assert compressed.values.grad.shape == (0,) and not x.grad.any()


def test_layers_are_chosen_by_their_share_of_zeros() -> None:
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10), nn.Linear(10, 10))
    for layer, zeros in zip(model, (59, 60, 61), strict=True):
        with torch.no_grad():
            layer.weight.fill_(1).view(-1)[:zeros] = 0
    kinds = [type(layer) for layer in st.compress(model, min_sparsity=0.6)]
    assert kinds == [nn.Linear, SparseLinear, SparseLinear]
    kinds = [type(layer) for layer in st.compress(model)]
    assert kinds == [SparseLinear] * 3


def test_the_model_stays_as_it_was() -> None:
    model = make_zeros(convolutions())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = [type(layer) for layer in model]
    compressed = st.compress(model)
    with torch.no_grad():
        for tensor in (*compressed.parameters(), *compressed.buffers()):
            tensor.fill_(7)
    assert [type(layer) for layer in model] == kinds
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())


@pytest.mark.parametrize("train", [True, False])
def test_train_and_eval_mode_are_kept(train: bool) -> None:
    compressed = st.compress(make_zeros(convolutions()).train(train))
    assert all(module.training == train for module in compressed.modules())


def test_frozen_weights_stay_frozen_and_others_train() -> None:
    model = make_zeros(mlp())
    model[0].weight.requires_grad_(False)
    compressed = st.compress(model)
    assert not compressed[0].values.requires_grad
    compressed(torch.randn(4, 30)).sum().backward()
    assert compressed[2].values.grad is not None and compressed[0].values.grad is None


def test_a_model_that_is_one_layer() -> None:
    model = make_zeros(nn.Linear(20, 10))
    compressed = st.compress(model)
    assert type(compressed) is SparseLinear and type(model) is nn.Linear
    close(model, compressed, torch.randn(3, 20))


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(12, 20)
        self.decode = nn.Linear(20, 12)
        self.again = nn.Linear(20, 12)
        self.again.weight = self.decode.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.encode(x)
        return self.decode(hidden) + self.again(hidden).abs()


def test_tied_weights_stay_tied() -> None:
    model = make_zeros(TwoHeads())
    compressed = st.compress(model)
    assert type(compressed.encode) is SparseLinear
    assert type(compressed.decode) is nn.Linear
    assert compressed.decode.weight is compressed.again.weight
    close(model, compressed, torch.randn(5, 12))


def test_a_layer_that_is_used_twice_stays_one() -> None:
    layer = nn.Linear(10, 10)
    model = make_zeros(nn.Sequential(layer, nn.ReLU(), layer))
    compressed = st.compress(model)
    assert compressed[0] is compressed[2] and type(compressed[0]) is SparseLinear
    close(model, compressed, torch.randn(5, 10))


def test_what_has_no_sparse_form_is_copied() -> None:
    model = make_zeros(
        nn.Sequential(nn.Linear(16, 16), nn.Unflatten(1, (4, 4)), nn.Conv1d(4, 4, 3))
    )
    compressed = st.compress(model)
    assert type(compressed[2]) is nn.Conv1d and type(compressed[0]) is SparseLinear
    close(model, compressed, torch.randn(3, 16))


def test_not_finite_weights_are_no_zeros() -> None:
    model = make_zeros(nn.Sequential(nn.Linear(10, 4)))
    with torch.no_grad():
        model[0].weight[0, 0], model[0].weight[1, 0] = float("nan"), float("inf")
    out = st.compress(model)(torch.ones(2, 10))
    assert out[:, 0].isnan().all() and out[:, 1].isinf().all() and out[:, 2:].isfinite().all()


def test_sparse_layers_are_kept() -> None:
    model = nn.Sequential(SparseLinear(20, 20, 0.7), nn.ReLU(), nn.Linear(20, 3))
    compressed = st.compress(model)
    assert compressed[0].pattern == model[0].pattern and compressed[0] is not model[0]
    assert type(compressed[2]) is nn.Linear
    make_zeros(model[2])
    assert type(st.compress(model)[2]) is SparseLinear


def test_trained_and_finalized() -> None:
    model = mlp()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = st.SparseOptimizer(base, model, st.Static(sparsity=0.8, allocation="uniform"))
    model(torch.randn(4, 30)).sum().backward()
    optimizer.step()
    optimizer.finalize()
    compressed = st.compress(model)
    assert [compressed[i].pattern.density for i in (0, 2)] == pytest.approx([0.2, 0.2], abs=1e-3)
    close(model, compressed, torch.randn(4, 30))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: make_zeros(mlp(), 0.3), r"0: 30\.0% of its weights are zero, below min_sparsity"),
        (lambda: make_zeros(mlp().half()), r"0: its dtype is float16"),
        (lambda: make_zeros(nn.Conv1d(4, 4, 3)), r"Conv1d: Conv1d has no sparse form"),
        (lambda: make_zeros(nn.Conv2d(4, 4, 3, groups=2)), r"Conv2d: it is a grouped convolution"),
        (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), r"the model has no weight matrix"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), r"no sparse form"),
        (
            lambda: nn.ModuleList(make_zeros(nn.Linear(4, 4), 0) for _ in range(8)),
            r"4: 0\.0% .*; and 3 more$",
        ),
    ],
)
def test_nothing_to_compress(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        st.compress(build())


def test_tied_weights_are_named_in_the_reasons() -> None:
    model = make_zeros(TwoHeads())
    del model.encode
    with pytest.raises(ValueError, match=r"decode: its weight is also again\.weight"):
        st.compress(model)


@pytest.mark.parametrize("min_sparsity", [-0.1, 1.1, float("nan")])
def test_min_sparsity_is_a_share(min_sparsity: float) -> None:
    with pytest.raises(ValueError, match="min_sparsity"):
        st.compress(make_zeros(mlp()), min_sparsity=min_sparsity)


def by_torch(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), by_torch]
)
def test_compressed_models_are_copied_and_pickled(
    copied: Callable[[nn.Module], nn.Module],
) -> None:
    model = make_zeros(convolutions()).eval()
    compressed = st.compress(model)
    x = torch.randn(2, 3, 9, 9)
    compressed(x)
    twin = copied(compressed)
    assert torch.equal(twin(x), compressed(x))
    with torch.no_grad():
        twin[0].values.zero_()
    close(model, compressed, x)


def test_state_dicts_go_from_one_compressed_model_to_another() -> None:
    model, other = make_zeros(mlp(), 0.9), make_zeros(mlp(), 0.7)
    source, target = st.compress(model), st.compress(other)
    assert source[0].pattern != target[0].pattern
    target.load_state_dict(source.state_dict())
    x = torch.randn(6, 30)
    assert torch.equal(target(x), source(x))
