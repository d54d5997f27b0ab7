"""Which weights share a gate: shapes in which gates broadcast against the weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from sparsetrain.structures import Block

Shape = tuple[int, ...]
Per = Literal["weight", "input", "output"]


@dataclass(frozen=True)
class Sharing:
    """A weight seen as `view`, and its gates in a shape that broadcasts against that.

    Attributes:
        shape: of the weight.
        view: the weight's shape with dimensions split, as many elements.
        gates: as many dimensions as `view`, 1 where weights share a gate.
    """

    shape: Shape
    view: Shape
    gates: Shape

    @property
    def size(self) -> int:
        """Weights that share a gate."""
        return math.prod(self.view) // math.prod(self.gates)

    @property
    def is_single(self) -> bool:
        """Whether every weight has a gate of its own."""
        return self.size == 1

    def cut(self, weights: Tensor) -> Tensor:
        """Of something of the shape of `shape`, what is of the weights that are looked at."""
        return weights

    def times(self, weight: Tensor, gates: Tensor) -> Tensor:
        """The weight with each gate multiplied in, of the weight's shape."""
        if self.is_single:
            return weight * gates
        return (weight.reshape(self.view) * gates).view(self.shape)

    def spread(self, gates: Tensor) -> Tensor:
        """One entry a weight, of the weight's shape."""
        return gates.expand(self.view).reshape(self.shape)

    def gather(self, weights: Tensor) -> Tensor:
        """Sums over the weights of each gate, of the gates' shape."""
        if self.is_single:
            return weights
        shared = [d for d, (n, g) in enumerate(zip(self.view, self.gates, strict=True)) if n != g]
        return weights.reshape(self.view).sum(shared, keepdim=True)


def share(per: Per | Block, shape: Shape, *, transposed: bool = False) -> Sharing:
    """How weights of `shape` share gates.

    Args:
        per: a gate for each weight, input unit (channel), output unit (channel), or block.
        transposed: whether inputs are dimension 0, as in transposed convolutions.
    """
    if per == "weight" or (isinstance(per, Block) and per.size == (1, 1)):
        return Sharing(shape, shape, shape)
    if isinstance(per, Block):
        rows, columns = per.size
        grid = (shape[0] // rows, rows, math.prod(shape[1:]) // columns, columns)
        return Sharing(shape, grid, (grid[0], 1, grid[2], 1))
    dimension = int((per == "input") != transposed)
    gates = tuple(n if d == dimension else 1 for d, n in enumerate(shape))
    return Sharing(shape, shape, gates)
