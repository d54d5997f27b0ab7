"""What tests of compact files have in common: comparisons by bits, small models, a look inside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsetrain as st

safetensors = pytest.importorskip("safetensors.torch")

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(INTEGERS[tensor.element_size()])


def same(one: Tensor, other: Tensor) -> bool:
    alike = one.dtype == other.dtype and one.shape == other.shape
    return alike and torch.equal(bits(one), bits(other))


def same_state(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)


class Holder(nn.Module):
    """A model that is one tensor."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.register_buffer("tensor", tensor)


def network(sparsity: float = 0.9, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 25, 10)
    )
    with torch.no_grad():
        for layer in (model[0], model[3]):
            layer.weight[torch.rand(layer.weight.shape) < sparsity] = 0
    return model


def stored(path: Path) -> dict[str, str]:
    """Name of a tensor -> its coding."""
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["sparsetrain"])
    return {name: entry["stored"] for name, entry in header["index"]["tensors"].items()}


def refuses(model: nn.Module, path: Path, message: str, **options: Any) -> None:
    """The file is refused with a message, and the model is as it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        st.storage.load_into(model, path, **options)
    assert same_state(model.state_dict(), before)
    assert [type(module) for module in model.modules()] == kinds
