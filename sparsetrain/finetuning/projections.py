"""Learned linear maps from a student's layer to a wider layer of its teacher."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Projection(nn.Module):
    """A linear map over one dimension; over the channels of images it is a 1 x 1 convolution.

    Romero et al. 2015, "FitNets", section 2.2, without a nonlinearity.

    Args:
        dim: the dimension, counted from the front.
    """

    def __init__(self, inputs: int, outputs: int, dim: int, like: Tensor) -> None:
        super().__init__()
        self.dim = dim
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.linear = nn.Linear(inputs, outputs, device=like.device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs, ...] -> [..., outputs, ...]"""
        if x.shape[self.dim] != self.linear.in_features:
            raise ValueError(
                f"the projection is for {self.linear.in_features} channels and the student's layer "
                f"gives {x.shape[self.dim]} now: make a new one by st.distill"
            )
        projected: Tensor = self.linear(x.movedim(self.dim, -1))
        return projected.movedim(-1, self.dim)


def projection_for(student: Tensor, teacher: Tensor, what: str) -> Projection | None:
    """A new projection; None for outputs of the same shape.

    Raises:
        ValueError: more than channels differ.
    """
    if student.shape == teacher.shape:
        return None
    dim = _differing(student, teacher)
    if dim is None:
        raise ValueError(
            f"{_says(student, teacher, what)}: choose layers that differ in their channels alone, "
            "dimension 1 or the last"
        )
    return Projection(student.shape[dim], teacher.shape[dim], dim, student)


def _differing(student: Tensor, teacher: Tensor) -> int | None:
    """The dimension of channels, if that is all that differs."""
    if student.dim() != teacher.dim():
        return None
    pairs = enumerate(zip(student.shape, teacher.shape, strict=True))
    dims = [dim for dim, (own, other) in pairs if own != other]
    return dims[0] if len(dims) == 1 and dims[0] in (1, student.dim() - 1) else None


def require_same(student: Tensor, teacher: Tensor, what: str, advice: str = "") -> None:
    """Raise ValueError unless shapes are equal."""
    if student.shape != teacher.shape:
        raise ValueError(_says(student, teacher, what) + advice)


def _says(student: Tensor, teacher: Tensor, what: str) -> str:
    return (
        f"{what}: the student gives {tuple(student.shape)} and the teacher {tuple(teacher.shape)}"
    )
