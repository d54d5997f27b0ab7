"""2:4: which weights are, and what is missing where it cannot run. The products need a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import Tensor, nn

import sparsetrain as st
from sparsetrain.storage.semi_structured import is_two_of_four, why_not

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="needs a GPU of compute capability 8.0",
)


def two_of_four(rows: int, columns: int, dtype: torch.dtype = torch.float16) -> Tensor:
    weight = torch.rand(rows, columns // 4, 4) + 0.1
    weight.scatter_(2, weight.topk(2, dim=2, largest=False).indices, 0.0)
    return weight.reshape(rows, columns).to(dtype)


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype, device=weight.device)
    layer.weight = nn.Parameter(weight)
    return layer


def by_hand(weight: Tensor) -> bool:
    if weight.shape[1] % 4:
        return False
    rows = weight.tolist()
    return all(
        sum(value != 0 for value in row[start : start + 4]) <= 2
        for row in rows
        for start in range(0, len(row), 4)
    )


@given(
    rows=some.integers(1, 4),
    columns=some.integers(1, 16),
    density=some.floats(0, 1),
    seed=some.integers(0, 2**31),
)
def test_two_of_four_by_hand(rows: int, columns: int, density: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.rand(rows, columns, generator=generator) < density).float()
    assert is_two_of_four(weight) == by_hand(weight)


def test_two_of_four_examples() -> None:
    assert is_two_of_four(torch.tensor([[1.0, 0, 2, 0, 0, 0, 3, 4]]))
    assert not is_two_of_four(torch.tensor([[1.0, 0, 2, 3, 0, 0, 0, 0]]))
    assert not is_two_of_four(torch.zeros(3, 6))
    assert not is_two_of_four(torch.zeros(4))
    assert is_two_of_four(two_of_four(5, 12))


def test_trained_masks_are_two_of_four() -> None:
    model = nn.Linear(64, 32)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = st.SparseOptimizer(base, model, st.NMSparse(n=2, m=4, total_steps=2))
    assert not is_two_of_four(model.weight + 1)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 64)).sum().backward()
        optimizer.step()
    optimizer.finalize()
    assert is_two_of_four(model.weight)


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (two_of_four(32, 64, torch.float32), "its dtype is float32, not float16 or bfloat16"),
        (two_of_four(16, 64), "it is 16 x 64, not multiples of 32 outputs and 64 inputs"),
        (torch.zeros(32, 0).half(), "it is 32 x 0, not multiples of 32 outputs and 64 inputs"),
        (two_of_four(32, 96), "it is 32 x 96, not multiples of 32 outputs and 64 inputs"),
        (torch.ones(32, 64).half(), "more than two of some four consecutive inputs are non-zero"),
        (two_of_four(32, 64, torch.bfloat16), "it is on cpu: move the model to the GPU"),
    ],
)
def test_why_not(weight: Tensor, reason: str) -> None:
    assert why_not(weight) == reason


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        RuntimeError, match=r"compute capability 8\.0 or later: torch finds no GPU here"
    ):
        st.storage.semi_structured(linear(two_of_four(32, 64)))


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine that says it has a GPU; weights stay on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    return monkeypatch


def test_old_gpus(pretended_gpu: pytest.MonkeyPatch) -> None:
    pretended_gpu.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(RuntimeError, match=r"compute capability 8\.0 or later: this one has 7\.5"):
        st.storage.semi_structured(linear(two_of_four(32, 64)))


@pytest.mark.usefixtures("pretended_gpu")
def test_nothing_to_convert() -> None:
    model = nn.Sequential(linear(two_of_four(32, 64)), nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"0: it is on cpu: .*; 1: its dtype is float32"):
        st.storage.semi_structured(model)
    with pytest.raises(ValueError, match="the model has no weight matrix"):
        st.storage.semi_structured(nn.Conv2d(3, 3, 3))


def test_which_layers_are_converted(pretended_gpu: pytest.MonkeyPatch) -> None:
    def convert(weight: Tensor) -> Tensor:
        return weight.clone()

    module: Any = torch.sparse
    pretended_gpu.setattr(module, "to_sparse_semi_structured", convert)
    pretended_gpu.setattr(Tensor, "is_cuda", True)
    model = nn.ModuleDict({"good": linear(two_of_four(32, 64)), "odd": nn.Linear(4, 4)})
    model["tied"] = linear(two_of_four(32, 64))
    model["same"] = nn.Linear(64, 32)
    model["same"].weight = model["tied"].weight
    converted = st.storage.semi_structured(model)
    frozen = [name for name, held in converted.named_parameters() if not held.requires_grad]
    assert frozen == ["good.weight"]
    assert torch.equal(converted["good"].weight, model["good"].weight)
    assert converted["same"].weight is converted["tied"].weight
    assert all(held.requires_grad for held in model.parameters())


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_outputs_on_a_gpu(dtype: torch.dtype) -> None:
    model = nn.Sequential(linear(two_of_four(128, 64, dtype)), nn.ReLU()).cuda()
    converted = st.storage.semi_structured(model)
    for batch in (1, 7, 64):
        x = torch.rand(batch, 64, dtype=dtype, device="cuda")
        with torch.no_grad():
            torch.testing.assert_close(converted(x), model(x), rtol=2e-2, atol=2e-2)
