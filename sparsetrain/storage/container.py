"""The compact file: a safetensors file of tensors, non-zeros and an index that says how to read it.

A dense tensor `w` is stored under its name. One held by its non-zeros is two vectors, `w:values`
and `w:positions`. The metadata entry "sparsetrain" is JSON: the format's version and an index with
dtype, shape, coding and a checksum of each tensor, and a checksum of the index itself.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from sparsetrain.keeping import whole_file
from sparsetrain.storage.positions import bits_size, decode, encode

VERSION = 1
#: Under which a file's metadata holds the index.
KEY = "sparsetrain"
# Bytes that the header of a file grows by when a tensor is two vectors, names of 30 letters given.
_HEADER = 128

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


@dataclass(frozen=True)
class NonZeros:
    """A tensor by what is not zero in it.

    Attributes:
        shape: of the tensor.
        flat: flat (row-major) indices, int64 [nnz], ascending.
        values: [nnz], the entries there; all others are +0.
    """

    shape: tuple[int, ...]
    flat: Tensor
    values: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> NonZeros:
        """By bits, so that -0.0 counts as a value and comes back as it was."""
        bits = as_integers(tensor).view(-1)
        flat = bits.nonzero().view(-1)
        # Not every torch picks among floats of one byte.
        return cls(tuple(tensor.shape), flat, bits[flat].view(tensor.dtype))

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.values.dtype

    def to_dense(self) -> Tensor:
        """The whole tensor."""
        dense = torch.zeros(self.shape, dtype=self.dtype)
        as_integers(dense).view(-1)[self.flat] = as_integers(self.values)
        return dense


Held = Tensor | NonZeros


@dataclass(frozen=True)
class Contents:
    """What a file holds.

    Attributes:
        tensors: name -> tensor, dense or by its non-zeros; contiguous and on the CPU.
        tied: a second name of a tensor -> the first one.
    """

    tensors: Mapping[str, Held]
    tied: Mapping[str, str]

    def __getitem__(self, name: str) -> Held:
        return self.tensors[self.tied.get(name, name)]

    @property
    def names(self) -> list[str]:
        """Every name, tied ones included."""
        return [*self.tensors, *self.tied]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    stored: Literal["dense", "bits", "gaps8", "gaps16"]
    dtype: str
    shape: tuple[Annotated[int, Field(ge=0)], ...]
    checksum: int


class _Index(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    tensors: dict[str, _Entry]
    tied: dict[str, str]


def compact(tensor: Tensor) -> Held:
    """The tensor by its non-zeros where that takes fewer bytes, else the tensor itself."""
    if not tensor.is_floating_point() or tensor.dim() == 0:
        return tensor
    nonzeros = int(torch.count_nonzero(as_integers(tensor)))
    saved = (tensor.numel() - nonzeros) * tensor.element_size() - _HEADER
    return NonZeros.of(tensor) if saved > bits_size(tensor.numel()) else tensor


def as_integers(tensor: Tensor) -> Tensor:
    """The same memory as integers of the same size: 0 for +0.0 alone."""
    return tensor.view(_INTEGERS[tensor.element_size()])


def pack(contents: Contents) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of the safetensors file.

    Raises:
        ValueError: naming a tensor that such a file cannot hold.
    """
    parts: dict[str, Tensor] = {}
    entries: dict[str, dict[str, Any]] = {}
    for name, held in contents.tensors.items():
        dtype = str(held.dtype).removeprefix("torch.")
        if dtype not in _DTYPES:
            raise ValueError(f"{name} is of dtype {dtype}, which the file cannot hold")
        if name.endswith((":values", ":positions")):
            raise ValueError(f"the name {name} is taken for a part of another tensor: rename it")
        stored: str = "dense"
        if isinstance(held, NonZeros):
            stored, code = encode(held.flat, math.prod(held.shape))
            own = {f"{name}:values": held.values, f"{name}:positions": code}
        else:
            own = {name: held}
        parts |= own
        shape = list(held.shape)
        checksum = _checksum(own)
        entries[name] = {"stored": stored, "dtype": dtype, "shape": shape, "checksum": checksum}
    index = {"tensors": entries, "tied": dict(contents.tied)}
    header = {"version": VERSION, "checksum": _text_checksum(index), "index": index}
    return parts, {KEY: json.dumps(header, separators=(",", ":"))}


def unpack(parts: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Contents:
    """Inverse of `pack`; the tensors are new ones.

    Raises:
        ValueError: something does not fit together, saying what.
    """
    index = _read_index(metadata)
    wanted = {part for name, entry in index.tensors.items() for part in _part_names(name, entry)}
    if wanted != parts.keys():
        odd = sorted(wanted ^ parts.keys())
        raise ValueError(f"damaged: {odd[0]} is in the index or in the file, and not in both")
    tensors = {name: _unpack_one(name, entry, parts) for name, entry in index.tensors.items()}
    for name, first in index.tied.items():
        if name in tensors or first not in tensors:
            raise ValueError(f"damaged: {name} is tied to {first}, which cannot be")
    return Contents(tensors, index.tied)


def to_bytes(contents: Contents) -> bytes:
    """The file in memory."""
    parts, metadata = pack(contents)
    _, library = _safetensors("this")
    return bytes(library.save(parts, metadata))


def write(contents: Contents, path: Path) -> None:
    """Write a file, whole or not at all."""
    parts, metadata = pack(contents)
    _, library = _safetensors(f"writing {path}")
    with whole_file(path) as partial:
        library.save_file(parts, partial, metadata)


def read(path: Path) -> Contents:
    """Read a file and check everything in it.

    Raises:
        ValueError: the file is missing, damaged, cut short or of another kind.
    """
    if not path.is_file():
        problem = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise ValueError(f"{path} {problem}")
    safetensors, _ = _safetensors(f"reading {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # a damaged header can fail in any way
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    try:
        return unpack(parts, metadata)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_index(metadata: Mapping[str, str]) -> _Index:
    if KEY not in metadata:
        raise ValueError(
            "this is no compact file of sparsetrain, or its header is damaged; files of plain "
            "tensors are for safetensors.torch.load_file"
        )
    try:
        header = json.loads(metadata[KEY])
        version = header["version"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError("the index is damaged") from error
    if version != VERSION:
        raise ValueError(f"is of format {version}; this version of sparsetrain reads {VERSION}")
    if header.get("checksum") != _text_checksum(header.get("index")):
        raise ValueError("the index is damaged: its checksum differs")
    try:
        return _Index.model_validate(header["index"])
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"the index is damaged at {place}: {first['msg']}") from error


def _part_names(name: str, entry: _Entry) -> list[str]:
    return [name] if entry.stored == "dense" else [f"{name}:values", f"{name}:positions"]


def _unpack_one(name: str, entry: _Entry, parts: Mapping[str, Tensor]) -> Held:
    own = {part: parts[part] for part in _part_names(name, entry)}
    try:
        if _checksum(own) != entry.checksum:
            raise ValueError("is damaged: its checksum differs")
        first, *rest = own.values()
        if first.dtype != _DTYPES.get(entry.dtype):
            raise ValueError(f"is {first.dtype} in the file and {entry.dtype} in the index")
        if entry.stored == "dense":
            if first.shape != entry.shape:
                raise ValueError(f"has shape {tuple(first.shape)}, in the index {entry.shape}")
            return first.clone()
        code = rest[0]
        if first.dim() != 1 or code.dim() != 1 or code.dtype != torch.uint8:
            raise ValueError("has values or positions that are no vectors")
        flat = decode(entry.stored, code, first.numel(), math.prod(entry.shape))
        return NonZeros(entry.shape, flat, first.clone())
    except ValueError as error:
        raise ValueError(f"{name} {error}") from error


def _checksum(parts: Mapping[str, Tensor]) -> int:
    checksum = 0
    for part in parts.values():
        data = part.reshape(-1).view(torch.uint8).numpy()
        checksum = zlib.crc32(data.data, checksum)
    return checksum


def _text_checksum(index: Any) -> int:
    return zlib.crc32(json.dumps(index, sort_keys=True).encode())


def _safetensors(purpose: str) -> tuple[Any, Any]:
    try:
        return import_module("safetensors"), import_module("safetensors.torch")
    except ModuleNotFoundError as error:
        raise ValueError(f"{purpose} needs the package safetensors: pip install safetensors") from (
            error
        )
