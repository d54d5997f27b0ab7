"""Where the non-zeros of a sparse matrix are: compressed sparse rows (CSR) without the values."""

from __future__ import annotations

import math
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.int32]
_MOST = 2**31 - 1  # indices are int32: twice as fast, and half of the bytes, of int64


class Transposed(NamedTuple):
    """A pattern seen by columns.

    Attributes:
        pointers: int32 [columns + 1], where each column begins.
        rows: int32 [nnz], the row of each entry, ascending within a column.
        order: int32 [nnz], the place of each entry among the values, which are held by rows.
        place: int32 [nnz], the inverse of `order`.
    """

    pointers: Tensor
    rows: Tensor
    order: Tensor
    place: Tensor


class Pattern:
    """Positions of the non-zeros of a matrix, row by row. It never changes; edits make a new one.

    Attributes:
        shape: (rows, columns).
        pointers: int32 [rows + 1]; row r has the entries pointers[r] to pointers[r + 1] - 1.
        columns: int32 [nnz], ascending within a row.
    """

    def __init__(self, shape: tuple[int, int], pointers: Tensor, columns: Tensor) -> None:
        """Take index tensors that `check` accepts, or that are known to be right.

        Raises:
            ValueError: there are more non-zeros, rows or columns than int32 can count.
        """
        if max(columns.numel(), *shape) > _MOST:
            raise ValueError(f"a sparse matrix holds up to {_MOST:,} non-zeros, rows and columns")
        self.shape = shape
        self.pointers = pointers.to(torch.int32).contiguous()
        self.columns = columns.to(torch.int32).contiguous()

    @classmethod
    def of(cls, flat: Tensor, shape: tuple[int, int]) -> Pattern:
        """From flat (row-major) int64 indices, ascending."""
        rows, columns = shape
        starts = torch.arange(rows + 1) * columns
        return cls(shape, torch.searchsorted(flat, starts), flat % columns)

    def __getstate__(self) -> dict[str, object]:
        # The transposed pattern is made again when it is needed.
        return {"shape": self.shape, "pointers": self.pointers, "columns": self.columns}

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Pattern)
            and self.shape == other.shape
            and torch.equal(self.pointers, other.pointers)
            and torch.equal(self.columns, other.columns)
        )

    __hash__ = object.__hash__

    @property
    def nnz(self) -> int:
        """Number of non-zeros."""
        return self.columns.numel()

    @property
    def density(self) -> float:
        """Share of entries that are held, in [0, 1]."""
        return self.nnz / math.prod(self.shape)

    def rows(self) -> Tensor:
        """Row of each entry, int32 [nnz]."""
        lengths = self.pointers.diff()
        return torch.repeat_interleave(
            torch.arange(self.shape[0], dtype=torch.int32), lengths, output_size=self.nnz
        )

    def flat(self) -> Tensor:
        """Flat (row-major) index of each entry, int64 [nnz], ascending."""
        return self.rows().long().mul_(self.shape[1]).add_(self.columns)

    def mask(self) -> Tensor:
        """Bool [rows, columns], True at the non-zeros."""
        mask = torch.zeros(math.prod(self.shape), dtype=torch.bool)
        mask[self.flat()] = True
        return mask.view(self.shape)

    def transposed(self) -> Transposed:
        """The pattern by columns; made once."""
        return self._transposed

    @cached_property
    def _transposed(self) -> Transposed:
        ordered, order = torch.sort(self.columns, stable=True)
        pointers = torch.searchsorted(ordered, torch.arange(self.shape[1] + 1, dtype=torch.int32))
        place = torch.empty(self.nnz, dtype=torch.int32)
        place[order] = torch.arange(self.nnz, dtype=torch.int32)
        rows = self.rows()[order]
        return Transposed(pointers.to(torch.int32), rows, order.to(torch.int32), place)

    @cached_property
    def arrays(self) -> tuple[Array, Array]:
        """Pointers and columns as numpy arrays, which share their memory."""
        return self.pointers.numpy(), self.columns.numpy()

    @cached_property
    def transposed_arrays(self) -> tuple[Array, ...]:
        """The transposed pattern as numpy arrays."""
        return tuple(tensor.numpy() for tensor in self.transposed())

    def memory(self) -> int:
        """Bytes of the indices as they stand, the transposed ones included if they are made."""
        held = [self.pointers, self.columns, *self.__dict__.get("_transposed", ())]
        return sum(tensor.nbytes for tensor in held)


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape of a weight seen as a matrix: outputs, and everything else."""
    return shape[0], math.prod(shape[1:])


def check(shape: tuple[int, int], pointers: Tensor, columns: Tensor) -> None:
    """Refuse index tensors that are no pattern of `shape`.

    Raises:
        ValueError: saying what is wrong.
    """
    rows, width = shape
    for name, tensor in (("row pointers", pointers), ("columns", columns)):
        if tensor.dtype not in (torch.int32, torch.int64) or tensor.dim() != 1:
            raise ValueError(f"the {name} are not a vector of int32 or int64")
    if pointers.numel() != rows + 1:
        raise ValueError(f"there are {pointers.numel()} row pointers for {rows} rows")
    pointers, columns = pointers.long(), columns.long()  # differences of int32 may wrap around
    if pointers[0] != 0 or pointers[-1] != columns.numel() or (pointers.diff() < 0).any():
        raise ValueError(f"the row pointers do not rise from 0 to {columns.numel()}")
    if columns.numel() and (columns.min() < 0 or columns.max() >= width):
        raise ValueError(f"columns lie outside of 0 to {width - 1}")
    rising = columns.diff() > 0
    # Where a row begins the column may fall.
    begins = pointers[1:-1].long()
    begins = begins[(begins > 0) & (begins < columns.numel())]
    rising[begins - 1] = True
    if not rising.all():
        raise ValueError("columns do not ascend within their row")
