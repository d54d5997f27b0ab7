"""Compact files of sparse models: zeros take a bit or less, and every other bit comes back.

Built on safetensors, so nothing in a file is ever executed.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from sparsetrain.storage.compress import layers_to_hold_sparse
from sparsetrain.storage.container import Contents, Held, NonZeros, compact, read, write
from sparsetrain.storage.csr.convert import sparsify
from sparsetrain.storage.csr.layers import SparseLayer
from sparsetrain.storage.csr.pattern import Pattern, as_matrix

_PARTS = ("values", "row_pointers", "columns")  # of a sparse layer in a state dict


def save(model: nn.Module, path: str | Path) -> None:
    """Write the state of a model (parameters and buffers) to one compact safetensors file.

    Each floating-point tensor is stored as it is or as its non-zeros and their positions (a bit
    an entry, or the gaps between them), whichever takes fewer bytes. Sparse layers are stored
    under the name of the dense weight that they stand for, with their pattern. A tensor that has
    several names is stored once. The file appears whole or not at all.

    Args:
        path: of the file; folders are made. `.safetensors` is the usual ending.

    Raises:
        ValueError: something in the state is no tensor that such a file can hold, or safetensors
            is not installed.
    """
    write(contents_of(model), Path(path))


def load(path: str | Path) -> dict[str, Tensor]:
    """Read a file of `save` as a dense state dict, for `load_state_dict` of the plain model.

    Tensors are on the CPU, with dtype, shape and every bit as they were saved. Names that were
    tied hold the same tensor.

    Raises:
        ValueError: the file is missing, cut short, damaged or of another kind, or safetensors is
            not installed.
    """
    contents = read(Path(path))
    dense = {name: as_dense(held) for name, held in contents.tensors.items()}
    return dense | {name: dense[first] for name, first in contents.tied.items()}


def load_into(
    model: nn.Module,
    path: str | Path,
    *,
    storage: Literal["keep", "csr"] = "keep",
    min_sparsity: float = 0.5,
) -> None:
    """Read a file of `save` into a model, in place.

    Args:
        model: with the names, shapes and dtypes of the file. Its sparse layers take the pattern of
            the file. No `SparseOptimizer` may be training it, nor another optimizer if it has
            sparse layers: values of another number are another parameter.
        storage: "keep" leaves dense layers dense. "csr" turns those that `compress` would into
            sparse ones, without making the dense weight from the file first.
        min_sparsity: for "csr", the share of zeros from which on a layer is turned, in [0, 1].

    Raises:
        ValueError: the file cannot be read, or it does not fit the model; the message names the
            tensor. With "csr" also when no layer can be held sparse. The model is then as it was.
    """
    if storage not in ("keep", "csr"):
        raise ValueError(f"storage={storage!r} is not one of keep, csr")
    contents = read(Path(path))
    named = named_tensors(model)
    try:
        _check_fit(named, contents)
    except ValueError as error:
        raise ValueError(f"{path} does not fit the model: {error}") from error
    turned = _layers_to_turn(model, contents, min_sparsity) if storage == "csr" else {}
    sparse = {name for name, source in named.items() if isinstance(source, SparseLayer)}
    state = _state(contents, named, sparse | turned.keys())
    # Everything has been checked; from here on the model changes.
    for layer in set(turned.values()):
        _make_sparse(layer)
    model.load_state_dict(state)


def as_dense(held: Held) -> Tensor:
    """The tensor, whichever way it is held."""
    return held.to_dense() if isinstance(held, NonZeros) else held


def contents_of(model: nn.Module) -> Contents:
    """What a file of the model holds.

    Raises:
        ValueError: something in the state is no strided tensor.
    """
    named = named_tensors(model)
    tied = _tied(named)
    tensors = {name: _held(source) for name, source in named.items() if name not in tied}
    return Contents(tensors, tied)


def named_tensors(model: nn.Module) -> dict[str, Tensor | SparseLayer]:
    """The state of a model by name; a sparse layer stands for its weight.

    Raises:
        ValueError: naming what is no tensor with values in it.
    """
    layers = {
        f"{name}." if name else "": module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, SparseLayer)
    }
    found: dict[str, Tensor | SparseLayer] = {}
    for key, value in model.state_dict().items():
        prefix, leaf = key[: key.rfind(".") + 1], key.rpartition(".")[2]
        if prefix in layers and leaf in _PARTS:
            found[f"{prefix}weight"] = layers[prefix]
        else:
            found[key] = _plain(key, value)
    return found


def _plain(key: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise ValueError(f"{key} is {type(value).__name__}, and files hold tensors alone")
    if value.layout is not torch.strided:
        raise ValueError(f"{key} has the layout {value.layout}, which no file holds")
    if value.is_meta:
        raise ValueError(f"{key} has no values yet: call model.to_empty(device='cpu') first")
    return value


def _held(source: Tensor | SparseLayer) -> Held:
    if isinstance(source, SparseLayer):
        values = source.values.detach().cpu().contiguous()
        return NonZeros(source.weight_shape, source.pattern.flat(), values)
    return compact(source.detach().cpu().contiguous())


def _tied(named: dict[str, Tensor | SparseLayer]) -> dict[str, str]:
    """Each further name of a tensor -> its first name."""
    first: dict[object, str] = {}
    tied = {}
    for name, source in named.items():
        known = first.setdefault(_identity(source), name)
        if known != name:
            tied[name] = known
    return tied


def _identity(source: Tensor | SparseLayer) -> object:
    if isinstance(source, SparseLayer):
        return id(source.values), id(source.pattern)
    if source.numel() == 0:  # such tensors have no memory to tell them apart by
        return id(source)
    layout = source.shape, source.stride(), source.dtype
    return source.device, source.data_ptr(), *layout


def _check_fit(named: dict[str, Tensor | SparseLayer], contents: Contents) -> None:
    _check_names(named, contents)
    for name, source in named.items():
        if isinstance(source, SparseLayer):
            shape, dtype = source.weight_shape, source.values.dtype
        else:
            shape, dtype = tuple(source.shape), source.dtype
        held = contents[name]
        if tuple(held.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(held.shape)} in the file, {shape} here")
        if held.dtype != dtype:
            raise ValueError(f"{name} is {held.dtype} in the file, {dtype} here: use model.to()")
    for name, first in _tied(named).items():
        if not _are_equal(contents[name], contents[first]):
            raise ValueError(f"{name} and {first} differ in the file and are one tensor here")


def _check_names(named: Iterable[str], contents: Contents) -> None:
    in_model, in_file = list(named), contents.names
    missing = [name for name in in_model if name not in set(in_file)]
    unknown = [name for name in in_file if name not in set(in_model)]
    problems = [
        f"{what} {', '.join(names[:5])}" + (f" and {len(names) - 5} more" * (len(names) > 5))
        for what, names in (("the file lacks", missing), ("the model lacks", unknown))
        if names
    ]
    if problems:
        raise ValueError("; ".join(problems))


def _are_equal(one: Held, other: Held) -> bool:
    if one is other:
        return True
    a, b = as_dense(one).reshape(-1), as_dense(other).reshape(-1)
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _layers_to_turn(
    model: nn.Module, contents: Contents, min_sparsity: float
) -> dict[str, nn.Module]:
    """Name of a weight -> the layer that is to hold it sparse."""

    def zeros(name: str, layer: nn.Module) -> float:
        held = contents[_weight(name)]
        values = held.values if isinstance(held, NonZeros) else held
        total = torch.Size(held.shape).numel()
        return 1 - int(torch.count_nonzero(values)) / total if total else 0.0

    chosen = layers_to_hold_sparse(model, zeros, min_sparsity)
    layers = {model.get_submodule(name) for name in chosen}
    every_name = model.named_modules(remove_duplicate=False)
    return {_weight(name): module for name, module in every_name if module in layers}


def _weight(layer: str) -> str:
    return f"{layer}.weight" if layer else "weight"


def _state(contents: Contents, named: Iterable[str], sparse: set[str]) -> dict[str, Tensor]:
    """The state dict for a model that holds the weights named in `sparse` so."""
    state: dict[str, Tensor] = {}
    for name in named:
        held = contents[name]
        if name not in sparse:
            state[name] = as_dense(held)
            continue
        held = held if isinstance(held, NonZeros) else NonZeros.of(held)
        pattern = Pattern.of(held.flat, as_matrix(held.shape))
        parts = (held.values, pattern.pointers, pattern.columns)
        prefix = name.removesuffix("weight")
        state |= {prefix + part: tensor for part, tensor in zip(_PARTS, parts, strict=True)}
    return state


def _make_sparse(module: nn.Module) -> None:
    """Hold the weight by no values at all, until the state dict brings them."""
    weight = module._parameters["weight"]
    assert weight is not None  # chosen as a layer that csr can hold
    sparsify(module, torch.zeros((), dtype=torch.bool).expand(weight.shape))
