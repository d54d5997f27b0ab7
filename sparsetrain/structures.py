"""Which weights are kept or dropped together, and in which groups they compete.

A structure views a weight as a matrix ``[groups, units]``. A unit is what is kept or dropped as a
whole (one weight, or one block); every group keeps the same number of units. Selection works on
that matrix and knows no layout; :meth:`Structure.units` and :meth:`Structure.expand` go there and
back.
"""

import difflib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from einops import rearrange, reduce
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, model_validator
from torch import Tensor

Shape = tuple[int, ...]


class Structure(BaseModel, ABC):
    """Base of the structures; shapes are those of a weight, output dimension first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @abstractmethod
    def check(self, shape: Shape, name: str) -> None:
        """Raise ValueError naming the layer when a weight of ``shape`` cannot be so structured."""

    @abstractmethod
    def units(self, scores: Tensor) -> Tensor:
        """Scores of the units, ``[groups, units]``, from the scores of the weights."""

    @abstractmethod
    def expand(self, unit_mask: Tensor, shape: Shape) -> Tensor:
        """Mask of ``shape`` from a mask over units, the inverse layout of :meth:`units`."""

    @abstractmethod
    def quantum(self, shape: Shape) -> int:
        """The number of active weights must be a multiple of this."""

    def fixed_count(self, shape: Shape) -> int | None:
        """The number of active weights where the structure alone decides it, else None."""
        return None


class Unstructured(Structure):
    """Every weight on its own: one group, one unit a weight."""

    kind: Literal["unstructured"] = "unstructured"

    def check(self, shape: Shape, name: str) -> None:
        """Any shape that holds a weight will do."""
        if math.prod(shape) == 0:
            raise ValueError(f"layer {name!r} has no weights (shape {tuple(shape)})")

    def units(self, scores: Tensor) -> Tensor:
        """``[1, numel]``."""
        return scores.reshape(1, -1)

    def expand(self, unit_mask: Tensor, shape: Shape) -> Tensor:
        """Reshape ``[1, numel]`` to ``shape``."""
        return unit_mask.reshape(shape)

    def quantum(self, shape: Shape) -> int:
        """1: any count."""
        return 1


class NM(Structure):
    """n of every m consecutive inputs, as in 2:4 (Mishra et al. 2021, section 3).

    Groups run along dimension 1 of the weight: the inputs of a linear layer, the input channels of
    a convolution (each kernel position has its own groups). The count is fixed at ``n/m``.
    """

    kind: Literal["n_m"] = "n_m"
    n: int = Field(default=2, ge=1, description="Weights kept in a group, 1 to m.")
    m: int = Field(default=4, ge=1, description="Weights in a group, consecutive inputs.")

    @model_validator(mode="after")
    def _n_within_m(self) -> "NM":
        if self.n > self.m:
            raise ValueError(f"n={self.n} is larger than m={self.m}: n of m weights are kept")
        return self

    def check(self, shape: Shape, name: str) -> None:
        """Needs two or more dimensions, the second divisible by ``m``."""
        _needs_matrix(shape, name, f"{self.n}:{self.m}")
        if shape[1] % self.m:
            raise ValueError(
                f"layer {name!r} of shape {tuple(shape)}: {shape[1]} inputs are not divisible by "
                f"m={self.m}; exclude it with a rule that sets dense: true, or choose another m"
            )

    def units(self, scores: Tensor) -> Tensor:
        """``[numel / m, m]``."""
        return rearrange(_three_dims(scores), "o (g m) r -> (o g r) m", m=self.m)

    def expand(self, unit_mask: Tensor, shape: Shape) -> Tensor:
        """Put the groups of ``[numel / m, m]`` back along the inputs."""
        outputs, inputs, rest = shape[0], shape[1], math.prod(shape[2:])
        mask = rearrange(
            unit_mask, "(o g r) m -> o (g m) r", o=outputs, g=inputs // self.m, r=rest, m=self.m
        )
        return mask.reshape(shape)

    def quantum(self, shape: Shape) -> int:
        """The fixed count itself."""
        return self.fixed_count(shape)

    def check_sparsity(self, sparsity: float | None) -> None:
        """Raise ValueError for a sparsity that is not ``1 - n/m``; None is no claim."""
        own = 1 - self.n / self.m
        if sparsity is not None and abs(sparsity - own) > 1e-9:
            raise ValueError(
                f"structure {self.n}:{self.m} has sparsity {own:.4g}, not {sparsity}: leave "
                "'sparsity' out or make both agree"
            )

    def fixed_count(self, shape: Shape) -> int:
        """``n/m`` of the weights."""
        return math.prod(shape) // self.m * self.n


class Block(Structure):
    """Rectangles of weights are kept or dropped as one.

    The weight is seen as a matrix ``[dim 0, all other dims flattened]``; the score of a block is
    the sum of the scores in it.
    """

    kind: Literal["block"] = "block"
    size: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = Field(
        description="Rows (outputs) and columns (flattened inputs) of a block."
    )

    def check(self, shape: Shape, name: str) -> None:
        """Needs two or more dimensions that the block size divides."""
        _needs_matrix(shape, name, "block")
        rows, columns = shape[0], math.prod(shape[1:])
        if rows % self.size[0] or columns % self.size[1]:
            raise ValueError(
                f"layer {name!r} of shape {tuple(shape)}: its {rows} x {columns} matrix is not "
                f"divisible into blocks of {self.size[0]} x {self.size[1]}; exclude it with a "
                "rule that sets dense: true, or choose another size"
            )

    def units(self, scores: Tensor) -> Tensor:
        """``[1, blocks]``, blocks in row-major order."""
        if scores.dtype in (torch.float16, torch.bfloat16):
            scores = scores.float()
        a, b = self.size
        return reduce(_matrix(scores), "(r a) (c b) -> 1 (r c)", "sum", a=a, b=b)

    def expand(self, unit_mask: Tensor, shape: Shape) -> Tensor:
        """Spread each of ``[1, blocks]`` over its rectangle."""
        a, b = self.size
        grid = unit_mask.reshape(shape[0] // a, 1, math.prod(shape[1:]) // b, 1)
        matrix = rearrange(grid.expand(-1, a, -1, b), "r a c b -> (r a) (c b)")
        return matrix.reshape(shape)

    def quantum(self, shape: Shape) -> int:
        """The weights in one block."""
        return self.size[0] * self.size[1]


class ConstantFanIn(Structure):
    """Each output (row of dimension 0) keeps the same number of inputs.

    As in Lasby et al. 2024, structured RigL; the layout that runs fast without padding.
    """

    kind: Literal["constant_fan_in"] = "constant_fan_in"

    def check(self, shape: Shape, name: str) -> None:
        """Needs two or more dimensions."""
        _needs_matrix(shape, name, "constant fan-in")

    def units(self, scores: Tensor) -> Tensor:
        """``[outputs, inputs]``, a convolution's inputs being channels x kernel positions."""
        return _matrix(scores)

    def expand(self, unit_mask: Tensor, shape: Shape) -> Tensor:
        """Reshape ``[outputs, inputs]`` to ``shape``."""
        return unit_mask.reshape(shape)

    def quantum(self, shape: Shape) -> int:
        """The number of outputs: one weight for each."""
        return shape[0]


def _matrix(tensor: Tensor) -> Tensor:
    # Not with -1, which says nothing of a tensor without rows, as a rank may hold.
    return tensor.reshape(tensor.shape[0], math.prod(tensor.shape[1:]))


def _three_dims(tensor: Tensor) -> Tensor:
    return tensor.reshape(tensor.shape[0], tensor.shape[1], math.prod(tensor.shape[2:]))


def _needs_matrix(shape: Shape, name: str, what: str) -> None:
    if len(shape) < 2 or math.prod(shape) == 0:
        raise ValueError(
            f"layer {name!r} of shape {tuple(shape)}: {what} needs a weight of at least two "
            "non-empty dimensions; exclude it with a rule that sets dense: true"
        )


AnyStructure = Annotated[
    Unstructured | NM | Block | ConstantFanIn,
    Field(discriminator="kind"),
]
_KINDS = ("unstructured", "n_m", "block", "constant_fan_in")
_ADAPTER: TypeAdapter[Unstructured | NM | Block | ConstantFanIn] = TypeAdapter(AnyStructure)


def _normalise(value: object) -> object:
    """A string (``constant_fan_in`` or ``2:4``) as the dict it stands for; the rest unchanged."""
    if isinstance(value, Structure | Mapping):
        return value
    if not isinstance(value, str):
        raise ValueError(
            f"{value!r} is not a structure: give one of {', '.join(_KINDS)}, a mapping with a "
            "kind, or n:m in quotes (YAML reads an unquoted 2:4 as a number)"
        )
    if match := re.fullmatch(r"(\d+):(\d+)", value):
        return {"kind": "n_m", "n": int(match[1]), "m": int(match[2])}
    if value not in _KINDS:
        near = difflib.get_close_matches(value, _KINDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(_KINDS)}"
        raise ValueError(f"unknown structure {value!r}: {hint}")
    return {"kind": value}


StructureField = Annotated[
    AnyStructure, BeforeValidator(_normalise, json_schema_input_type=AnyStructure | str)
]
"""Annotation for a pydantic field that takes a structure, its name, ``"2:4"`` or a mapping."""


def parse_structure(value: "Structure | str | Mapping[str, Any]") -> Structure:
    """A structure from its name, ``"n:m"``, a mapping with a ``kind``, or itself.

    Raises ValueError for an unknown name (with the nearest known one) or a bad field.
    """
    return _ADAPTER.validate_python(_normalise(value))
