"""Look into a checkpoint: which tensors it holds and how many of their values are zero."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sparsetrain import checkpoint
from sparsetrain.candidates import plain_name
from sparsetrain.storage import container, files

if TYPE_CHECKING:
    from rich.table import Table

# Beside these keys a dict is an optimizer's state: its tensors are not weights.
_OPTIMIZER_KEYS = {"state", "param_groups"}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint: its path in the file, shape, dtype and number of non-zeros."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nonzeros: int

    @property
    def numel(self) -> int:
        """Number of values, zeros included."""
        return int(torch.Size(self.shape).numel())

    @property
    def sparsity(self) -> float:
        """Share of zeros, in [0, 1]; 0 for an empty tensor."""
        return 1 - self.nonzeros / self.numel if self.numel else 0.0


@dataclass(frozen=True)
class CheckpointInfo:
    """The tensors of a checkpoint, in the file's order."""

    path: Path
    tensors: tuple[TensorInfo, ...]

    @property
    def numel(self) -> int:
        """Number of values in the tensors listed."""
        return sum(tensor.numel for tensor in self.tensors)

    @property
    def nonzeros(self) -> int:
        """Number of those that are not zero."""
        return sum(tensor.nonzeros for tensor in self.tensors)

    @property
    def sparsity(self) -> float:
        """Share of zeros in the tensors listed, in [0, 1]."""
        return 1 - self.nonzeros / self.numel if self.numel else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "path": str(self.path),
            "numel": self.numel,
            "nonzeros": self.nonzeros,
            "sparsity": self.sparsity,
            "tensors": [
                {
                    "name": tensor.name,
                    "shape": list(tensor.shape),
                    "dtype": tensor.dtype,
                    "numel": tensor.numel,
                    "nonzeros": tensor.nonzeros,
                    "sparsity": tensor.sparsity,
                }
                for tensor in self.tensors
            ],
        }

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table(
            title=f"{self.path.name}: {100 * self.sparsity:.2f} % zeros", show_footer=True
        )
        table.add_column("tensor", footer="total", overflow="fold")
        table.add_column("shape", justify="right")
        table.add_column("type")
        table.add_column("weights", footer=f"{self.numel:,}", justify="right")
        table.add_column("non-zeros", footer=f"{self.nonzeros:,}", justify="right")
        table.add_column("sparsity", footer=f"{100 * self.sparsity:.2f} %", justify="right")
        for tensor in self.tensors:
            table.add_row(
                tensor.name,
                " x ".join(map(str, tensor.shape)) or "scalar",
                tensor.dtype,
                f"{tensor.numel:,}",
                f"{tensor.nonzeros:,}",
                f"{100 * tensor.sparsity:.2f} %",
            )
        return table


def inspect_checkpoint(path: str | Path, *, everything: bool = False) -> CheckpointInfo:
    """Count the zeros of each weight in a torch or safetensors checkpoint.

    Dicts and lists inside a torch file are searched to any depth, so that
    `{"epoch": 3, "model": model.state_dict(), "optimizer": optimizer.state_dict()}` works like a
    bare state dict; optimizer states are left out. Listed are the floating-point tensors of two or
    more dimensions (biases and norms are not made sparse), or `everything`.

    Raises ValueError when the file is missing, cut short, of another kind, needs code to be run
    to be read, or holds no such tensor. Nothing in the file is ever executed.
    """
    path = Path(path)
    content = _read(path)
    named = list(_tensors(content, "", everything))
    infos = tuple(_info(name, tensor) for name, tensor in named if everything or _is_weight(tensor))
    infos = _behind_masks(infos, _learned_masks(content), everything)
    if not infos:
        raise ValueError(
            f"{path} holds no {'tensor' if everything else 'weight of two or more dimensions'} "
            f"({len(named)} tensors in all)"
        )
    return CheckpointInfo(path, infos)


def _read(path: Path) -> Any:
    if not path.is_file():
        problem = "is a folder, not a checkpoint file" if path.is_dir() else "does not exist"
        raise ValueError(f"{path} {problem}")
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        safetensors = import_module("safetensors")
        load_file = import_module("safetensors.torch").load_file
    except ModuleNotFoundError as error:
        raise ValueError(
            f"reading {path} needs the package safetensors: pip install 'sparsetrain[demo]'"
        ) from error
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            is_compact = container.KEY in (file.metadata() or {})
        tensors: dict[str, Tensor] = {} if is_compact else load_file(path)
    except (safetensors.SafetensorError, OSError, KeyError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    return files.load(path) if is_compact else tensors


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can fail in any way
        if isinstance(error, pickle.UnpicklingError) and zipfile.is_zipfile(path):
            raise ValueError(
                f"{path} holds Python objects beside tensors, which only running its code could "
                "read: save model.state_dict() instead of the model"
            ) from error
        raise ValueError(
            f"{path} is not a torch checkpoint, or it is damaged or cut short "
            f"({type(error).__name__} while reading it); files of safetensors must end in "
            ".safetensors"
        ) from error


def _tensors(
    value: Any, name: str, everything: bool, around: tuple[int, ...] = ()
) -> Iterator[tuple[str, Tensor]]:
    """Tensors at any depth; `around` are the ids of the containers that hold `value`."""
    if isinstance(value, Tensor):
        yield name or "tensor", value
        return
    if id(value) in around:
        return
    around = (*around, id(value))
    if isinstance(value, Mapping):
        if value.keys() >= _OPTIMIZER_KEYS and not everything:
            return
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return
    for key, inner in items:
        yield from _tensors(inner, f"{name}.{key}" if name else str(key), everything, around)


def _learned_masks(value: Any) -> dict[str, int]:
    """Name -> weights that evaluation keeps, from the optimizer's part of a checkpoint."""
    if not isinstance(value, Mapping):
        return {}
    saved = value.get(checkpoint.KEY)
    if isinstance(saved, Mapping) and isinstance(saved.get("targets"), Mapping):
        return {
            name: int(torch.from_numpy(np.bitwise_count(entry["mask"].numpy())).sum())
            for name, entry in saved["targets"].items()
            if checkpoint.storage_of(entry) == "learned"
        }
    found: dict[str, int] = {}
    for inner in value.values():
        found |= _learned_masks(inner)
    return found


def _behind_masks(
    infos: tuple[TensorInfo, ...], kept: Mapping[str, int], everything: bool
) -> tuple[TensorInfo, ...]:
    """Weights behind learned masks by their plain names, with the non-zeros of evaluation."""
    found = []
    for info in infos:
        name = plain_name(info.name)
        count = next((n for key, n in kept.items() if f".{name}".endswith(f".{key}")), None)
        if name != info.name and count is not None:
            found.append(replace(info, name=name, nonzeros=count))
        elif everything or ".parametrizations." not in info.name or not kept:
            found.append(info)
    return tuple(found)


def _is_weight(tensor: Tensor) -> bool:
    return tensor.dim() >= 2 and (tensor.is_floating_point() or tensor.is_complex())


def _info(name: str, tensor: Tensor) -> TensorInfo:
    return TensorInfo(
        name=name,
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        nonzeros=_count_nonzeros(tensor.detach()),
    )


def _count_nonzeros(tensor: Tensor) -> int:
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce().values()
    elif tensor.layout is not torch.strided:
        tensor = tensor.values()
    if tensor.is_floating_point() and tensor.element_size() == 1:
        tensor = tensor.float()
    return int(torch.count_nonzero(tensor))
