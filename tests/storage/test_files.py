"""Compact files: every bit comes back, and models change whole or not at all."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compact_files import Holder, network, refuses, safetensors, same, same_state, stored
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from torch import Tensor, nn

import sparsetrain as st
from sparsetrain.storage import SparseLinear, files
from sparsetrain.storage.container import NonZeros

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn]


def random_bits(
    shape: tuple[int, ...], dtype: torch.dtype, density: float, seed: int = 0
) -> Tensor:
    """Any bits (NaNs of all kinds, infinities, -0.0) at a share of the places, else +0.0."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 256, (*shape, size), dtype=torch.uint8, generator=generator)
    keep = torch.rand((*shape, 1), generator=generator) < density
    negative = torch.rand((*shape, 1), generator=generator) < density / 8
    minus_zero = torch.tensor(-0.0).to(dtype).view(1).view(torch.uint8)
    # As bytes: not every torch chooses among floats of one byte.
    raw = torch.where(negative, minus_zero, torch.where(keep, raw, 0).to(torch.uint8))
    return raw.view(dtype).squeeze(-1)


shapes = some.sampled_from([(), (0,), (0, 3), (1,), (300,), (40, 30), (3, 500), (8, 3, 5, 5)])
densities = some.sampled_from([0.0, 0.003, 0.05, 0.3, 0.5, 0.9, 1.0])


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=shapes | some.lists(some.integers(0, 12), max_size=4).map(tuple),
    dtype=some.sampled_from(FLOATS),
    density=densities | some.floats(0, 1),
    seed=some.integers(0, 2**31),
)
def test_every_bit_comes_back(
    shape: tuple[int, ...], dtype: torch.dtype, density: float, seed: int, tmp_path: Path
) -> None:
    tensor = random_bits(shape, dtype, density, seed)
    path = tmp_path / "a.safetensors"
    st.storage.save(Holder(tensor.clone()), path)
    assert same_state(st.storage.load(path), {"tensor": tensor})
    target = Holder(torch.ones_like(tensor, dtype=torch.float32).to(dtype))
    st.storage.load_into(target, path)
    assert same(target.tensor, tensor)


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool, torch.complex64]
)
def test_other_dtypes_are_stored_as_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.randint(0, 2, (30, 40)).to(dtype)
    st.storage.save(Holder(tensor), tmp_path / "a.safetensors")
    found = st.storage.load(tmp_path / "a.safetensors")["tensor"]
    assert found.dtype == dtype and torch.equal(found, tensor)


def test_any_memory_layout(tmp_path: Path) -> None:
    tensor = random_bits((6, 8, 10, 12), torch.float32, 0.2)
    for view in (tensor.permute(3, 1, 0, 2), tensor[:, ::2], tensor[:1].expand(4, -1, -1, -1)):
        st.storage.save(Holder(view), tmp_path / "a.safetensors")
        assert same(st.storage.load(tmp_path / "a.safetensors")["tensor"], view)


def test_empty_tensors_are_not_one(tmp_path: Path) -> None:
    model = nn.Module()
    for name, tensor in (("a", torch.ones(0, 3)), ("b", torch.ones(0)), ("c", torch.ones(0).int())):
        model.register_buffer(name, tensor)
    st.storage.save(model, tmp_path / "a")
    assert same_state(st.storage.load(tmp_path / "a"), dict(model.state_dict()))


# What is in a file.


@pytest.mark.parametrize(
    ("density", "coding"),
    [(1.0, "dense"), (0.98, "dense"), (0.5, "bits"), (0.05, "gaps8"), (0.002, "gaps16")],
)
def test_tensors_are_stored_as_is_shortest(density: float, coding: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensor = (torch.rand(300, 100) < density).float()
    st.storage.save(Holder(tensor), path)
    assert stored(path) == {"tensor": coding}
    position_bytes = {"dense": 0, "bits": 1 / 8, "gaps8": 0.06, "gaps16": 0.006}[coding]
    assert path.stat().st_size < (4.2 * density + position_bytes) * tensor.numel() + 700


def test_negative_zeros_count_as_values(tmp_path: Path) -> None:
    st.storage.save(Holder(torch.full((100, 30), -0.0)), tmp_path / "a")
    assert stored(tmp_path / "a") == {"tensor": "dense"}


def test_small_tensors_are_not_made_larger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [Holder((torch.rand(size, size) < 0.4).float()) for size in range(1, 20)]
    for number, model in enumerate(models):
        st.storage.save(model, tmp_path / f"{number}")
    assert stored(tmp_path / "0") == {"tensor": "dense"} != stored(tmp_path / "18")
    monkeypatch.setattr(files, "compact", lambda tensor: tensor)
    for number, model in enumerate(models):
        st.storage.save(model, tmp_path / "dense")
        assert (tmp_path / f"{number}").stat().st_size <= (tmp_path / "dense").stat().st_size


def test_one_model_gives_one_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        st.storage.save(network(), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_file_appears_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new folder" / "a.safetensors"
    st.storage.save(network(seed=1), path)
    before = path.read_bytes()
    writes = safetensors.save_file

    def fails(parts: Any, path: Path, metadata: Any) -> None:
        writes(parts, path, metadata)
        raise OSError("disk full")

    monkeypatch.setattr(safetensors, "save_file", fails)
    with pytest.raises(OSError, match="disk full"):
        st.storage.save(network(seed=2), path)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_sparse_layers_are_stored_by_the_name_of_the_dense_weight(tmp_path: Path) -> None:
    model = network().eval()
    compressed = st.compress(model)
    st.storage.save(compressed, tmp_path / "sparse")
    st.storage.save(model, tmp_path / "dense")
    assert (tmp_path / "sparse").read_bytes() == (tmp_path / "dense").read_bytes()
    assert same_state(st.storage.load(tmp_path / "sparse"), dict(model.state_dict()))


# The ways back.


def test_into_a_plain_model(tmp_path: Path) -> None:
    model, target = network(seed=1), network(0.2, seed=2)
    st.storage.save(model, tmp_path / "a")
    parameters = list(target.parameters())
    st.storage.load_into(target, tmp_path / "a")
    assert same_state(target.state_dict(), model.state_dict())
    assert all(a is b for a, b in zip(parameters, target.parameters(), strict=True))
    plain = network(seed=3)
    plain.load_state_dict(st.storage.load(tmp_path / "a"))
    assert same_state(plain.state_dict(), model.state_dict())


def test_into_csr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, target = network(seed=1).eval(), network(0.0, seed=2).eval()
    target[3].weight.requires_grad_(False)
    st.storage.save(model, tmp_path / "a")

    def made_dense(held: NonZeros) -> Tensor:
        raise AssertionError(f"a weight of shape {held.shape} was made dense")

    monkeypatch.setattr(NonZeros, "to_dense", made_dense)
    st.storage.load_into(target, tmp_path / "a", storage="csr")
    assert same_state(target.state_dict(), st.compress(model).state_dict())
    assert [target[0].values.requires_grad, target[3].values.requires_grad] == [True, False]
    x = torch.randn(2, 2, 5, 5)
    torch.testing.assert_close(target(x), model(x))


def test_into_csr_by_the_share_of_zeros(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(100, 10), nn.Linear(10, 100))
    with torch.no_grad():
        for layer, zeros in zip(model, (399, 400), strict=True):
            layer.weight.fill_(1).view(-1)[:zeros] = 0
    st.storage.save(model, tmp_path / "a")
    st.storage.load_into(model, tmp_path / "a", storage="csr", min_sparsity=0.4)
    assert [type(layer) for layer in model] == [nn.Linear, SparseLinear]


@pytest.mark.parametrize("storage", ["keep", "csr"])
@pytest.mark.parametrize("sparsity", [0.9, 0.0])
def test_sparse_layers_take_the_pattern(storage: Any, sparsity: float, tmp_path: Path) -> None:
    model, target = network(sparsity, seed=1), st.compress(network(0.7, seed=2))
    target[0].values.requires_grad_(False)
    st.storage.save(model, tmp_path / "a")
    st.storage.load_into(target, tmp_path / "a", storage=storage)
    assert same_state(target.state_dict(), st.compress(model, min_sparsity=0).state_dict())
    assert [target[0].values.requires_grad, target[3].values.requires_grad] == [False, True]


def test_zeros_within_a_pattern_survive(tmp_path: Path) -> None:
    model, target = SparseLinear(60, 50, 0.2), SparseLinear(60, 50, 0.1)
    with torch.no_grad():
        model.values[::3] = 0
        model.values[1::3] = -0.0
    st.storage.save(model, tmp_path / "a")
    st.storage.load_into(target, tmp_path / "a")
    assert target.pattern == model.pattern and same(target.values, model.values)


class Tied(nn.Module):
    def __init__(self, tied: bool, sparsity: float = 0.9) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(30, 30), nn.Linear(30, 30)
        self.three, self.same = nn.Linear(30, 30), nn.Linear(1, 1)
        with torch.no_grad():
            for layer in (self.one, self.two, self.three):
                layer.weight[torch.rand(30, 30) < sparsity] = 0
        if tied:
            self.two.weight = self.one.weight
            self.same = self.three
        else:
            self.same = nn.Linear(30, 30)


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    model = Tied(True)
    path = tmp_path / "a"
    st.storage.save(model, path)
    assert set(stored(path)) == {"one.weight", "one.bias", "two.bias", "three.weight", "three.bias"}
    state = st.storage.load(path)
    assert state["one.weight"] is state["two.weight"]
    assert same_state(state, dict(model.state_dict()))
    for target in (Tied(True), Tied(False)):
        st.storage.load_into(target, path)
        assert same_state(target.state_dict(), model.state_dict())
    target = Tied(True)
    st.storage.load_into(target, path, storage="csr")
    assert type(target.one) is nn.Linear and target.one.weight is target.two.weight
    assert type(target.three) is SparseLinear and target.same is target.three
    assert same(target.one.weight, model.one.weight)
    assert same(target.same.weight, model.three.weight)
    st.storage.save(target, tmp_path / "b")
    assert path.read_bytes() == (tmp_path / "b").read_bytes()


def test_a_tied_weight_cannot_take_two_values(tmp_path: Path) -> None:
    st.storage.save(Tied(False), tmp_path / "a")
    refuses(Tied(True), tmp_path / "a", r"two\.weight and one\.weight differ in the file")


# Models that do not fit.


@pytest.mark.parametrize("storage", ["keep", "csr"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.append(nn.Linear(2, 2)), r"the file lacks 4\.weight, 4\.bias$"),
        (lambda m: m.__delitem__(3), r"the model lacks 3\.weight, 3\.bias$"),
        (
            lambda m: m.__setitem__(3, nn.Linear(10, 200)),
            r"3\.weight has shape \(10, 200\) in the file, \(200, 10\) here",
        ),
        (
            lambda m: m.__setitem__(3, SparseLinear(10, 200, 0.5)),
            r"3\.weight has shape \(10, 200\) in the file, \(200, 10\) here",
        ),
        (lambda m: m.double(), r"0\.weight is torch\.float32 in the file, torch\.float64 here"),
        (lambda m: m.__setitem__(1, nn.BatchNorm2d(8, device="meta")), r"1\.weight has no values"),
    ],
)
def test_models_that_do_not_fit(
    change: Callable[[nn.Module], Any], message: str, storage: str, tmp_path: Path
) -> None:
    st.storage.save(network(), tmp_path / "a")
    model = network(0.3)
    change(model)
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        with pytest.raises(ValueError, match=message):
            st.storage.load_into(model, tmp_path / "a", storage=storage)
    else:
        refuses(model, tmp_path / "a", message, storage=storage)


def test_many_names_are_not_all_listed(tmp_path: Path) -> None:
    st.storage.save(nn.Linear(1, 1), tmp_path / "a")
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(4)))
    refuses(model, tmp_path / "a", r"2\.weight and 3 more; the model lacks weight, bias")


def test_csr_needs_a_sparse_layer(tmp_path: Path) -> None:
    st.storage.save(network(0.3), tmp_path / "a")
    message = r"no layer can be held sparse: 0: .* of its weights are zero"
    refuses(network(), tmp_path / "a", message, storage="csr")
    refuses(network(), tmp_path / "a", "min_sparsity", storage="csr", min_sparsity=2)
    refuses(network(), tmp_path / "a", "storage='dense' is not one of", storage="dense")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(3, dtype=torch.complex128), r"tensor is of dtype complex128"),
        (torch.zeros(3, device="meta"), r"tensor has no values yet: call model\.to_empty"),
        (torch.eye(3).to_sparse(), r"tensor has the layout torch\.sparse_coo"),
    ],
)
def test_what_no_file_holds(tensor: Tensor, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        st.storage.save(Holder(tensor), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_extra_state_and_taken_names(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"epoch": 3}

    with pytest.raises(ValueError, match="_extra_state is dict, and files hold tensors alone"):
        st.storage.save(Extra(2, 2), tmp_path / "a")
    model = nn.Module()
    model.register_buffer("w:values", torch.ones(3))
    with pytest.raises(ValueError, match="w:values is taken"):
        st.storage.save(model, tmp_path / "a")


# Sizes.


def test_sizes_are_those_of_the_files(tmp_path: Path) -> None:
    model = network()
    st.storage.save(model, tmp_path / "a")
    safetensors.save_file(model.state_dict(), tmp_path / "b")
    sizes = st.storage.sizes(model)
    assert sizes == st.storage.sizes(tmp_path / "a") == st.storage.sizes(st.compress(model))
    assert sizes.compact == (tmp_path / "a").stat().st_size
    assert sizes.dense == (tmp_path / "b").stat().st_size
    gzipped = [len(gzip.compress((tmp_path / name).read_bytes(), 6)) for name in ("a", "b")]
    assert [sizes.compact_gzip, sizes.dense_gzip] == gzipped
    assert sizes.compact_gzip < sizes.compact < sizes.dense and sizes.dense_gzip < sizes.dense
    assert sizes.to_dict()["ratio"] == sizes.dense / sizes.compact
    assert f"{sizes.compact:,}" in str(sizes)


def test_sizes_count_tied_weights_once() -> None:
    assert st.storage.sizes(Tied(True)).dense < 0.6 * st.storage.sizes(Tied(False)).dense
