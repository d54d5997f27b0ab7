"""Where non-zeros are, as bytes of a file: a bit an entry, or the gaps between them.

"bits" holds a bit an entry, eight a byte, the first entry in the highest bit. "gaps8" and "gaps16"
hold, for each non-zero, how many zeros lie before it, in one byte or two (little-endian). The
largest number of that size, m, says: m zeros, and the gap goes on.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsetrain.storage.bits import pack_mask

Coding = Literal["bits", "gaps8", "gaps16"]

_NUMBERS: dict[Coding, np.dtype[np.unsignedinteger]] = {
    "gaps8": np.dtype("u1"),
    "gaps16": np.dtype("<u2"),
}


def bits_size(numel: int) -> int:
    """Bytes of a bit an entry, the most that `encode` takes."""
    return -(-numel // 8)


def encode(flat: Tensor, numel: int) -> tuple[Coding, Tensor]:
    """The shortest coding of positions.

    Args:
        flat: int64 [nnz], ascending, each below `numel`.

    Returns:
        The coding, and its bytes as a uint8 vector.
    """
    gaps = np.diff(flat.numpy(), prepend=-1) - 1
    sizes: dict[Coding, int] = {"bits": bits_size(numel)}
    sizes |= {coding: _gaps_size(gaps, dtype) for coding, dtype in _NUMBERS.items()}
    coding = min(sizes, key=lambda name: sizes[name])
    if coding != "bits":
        return coding, torch.from_numpy(_encode_gaps(gaps, _NUMBERS[coding]))
    mask = torch.zeros(numel, dtype=torch.bool)
    mask[flat] = True
    return coding, pack_mask(mask)


def decode(coding: Coding, code: Tensor, count: int, numel: int) -> Tensor:
    """Inverse of `encode`: flat indices, int64 [count], ascending, each below `numel`.

    Raises:
        ValueError: the bytes do not say `count` such positions.
    """
    data = code.numpy()
    flat = _decode_bits(data, numel) if coding == "bits" else _decode_gaps(data, _NUMBERS[coding])
    if flat.size != count:
        raise ValueError(f"has positions for {flat.size} values and holds {count}")
    if flat.size and flat[-1] >= numel:
        raise ValueError(f"has a value at position {flat[-1]} of {numel}")
    return torch.from_numpy(flat)


def _decode_bits(data: NDArray[np.uint8], numel: int) -> NDArray[np.int64]:
    if data.size != bits_size(numel):
        raise ValueError(f"has {data.size} bytes of bits for {numel} entries")
    # Bits beyond the last entry count as positions out of range.
    return np.flatnonzero(np.unpackbits(data)).astype(np.int64, copy=False)


def _gaps_size(gaps: NDArray[np.int64], dtype: np.dtype[np.unsignedinteger]) -> int:
    most = int(np.iinfo(dtype).max)
    return int((gaps // most + 1).sum()) * dtype.itemsize


def _encode_gaps(gaps: NDArray[np.int64], dtype: np.dtype[np.unsignedinteger]) -> NDArray[np.uint8]:
    most = int(np.iinfo(dtype).max)
    ends = np.cumsum(gaps // most + 1) - 1  # place of the number that ends each gap
    numbers = np.full(ends[-1] + 1 if ends.size else 0, most, dtype=dtype)
    numbers[ends] = gaps % most
    return numbers.view(np.uint8)


def _decode_gaps(data: NDArray[np.uint8], dtype: np.dtype[np.unsignedinteger]) -> NDArray[np.int64]:
    if data.size % dtype.itemsize:
        raise ValueError(f"has {data.size} bytes of positions, which is no number of gaps")
    numbers = data.view(dtype)
    is_end = numbers != np.iinfo(dtype).max
    if numbers.size and not is_end[-1]:
        raise ValueError("has positions that end within a gap")
    flat: NDArray[np.int64] = np.cumsum(numbers, dtype=np.int64)[is_end]
    flat += np.arange(flat.size)
    return flat
