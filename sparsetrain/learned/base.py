"""What a learned mask is: a parametrization of a weight with parameters of its own."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from sparsetrain.learned.sharing import Sharing
from sparsetrain.part import Part
from sparsetrain.selection import top_k

#: How far beyond the border a gate is put that changes sides by decree.
_STEP = 0.05


class LearnedMask(nn.Module):
    """A parametrization weight -> masked weight. Its own parameters train with the weight.

    In training mode the mask may be random; in evaluation mode it is fixed and so is what `mask`
    says. The noise comes from torch's global random source, as that of dropout does.
    """

    #: Whether `penalty` is something to train against.
    has_penalty: bool = True
    #: Name of a buffer that has an entry for each gate -> name of the gates.
    gate_buffers: ClassVar[dict[str, str]] = {}

    def __init__(self, sharing: Sharing) -> None:
        super().__init__()
        self.sharing = sharing

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the layer computes with, of the weight's own type."""
        exact = weight.to(gate_dtype(weight))
        masked = self.sampled(exact) if self.training else self.evaluated(exact)
        return masked.to(weight.dtype)

    def sampled(self, weight: Tensor) -> Tensor:
        """The weight of a training pass."""
        return self.evaluated(weight)

    @abstractmethod
    def evaluated(self, weight: Tensor) -> Tensor:
        """The weight of an evaluation pass."""

    @abstractmethod
    def mask(self, weight: Tensor) -> Tensor:
        """Bool tensor of the weight's shape, True where `evaluated` keeps the weight."""

    def hook(self, module: nn.Module) -> list[RemovableHandle]:
        """Hooks on the layer, for a method that does more than change its weight."""
        return []

    def gates(self) -> list[Parameter]:
        """The parameters of the mask itself."""
        return list(self.parameters())

    # The regulariser.

    def penalty(self, weight: Tensor) -> Tensor:
        """What the method adds to the loss, for a strength of 1; a scalar."""
        return torch.zeros((), device=weight.device)

    def add_penalty_gradient(self, weight: Parameter, strength: float) -> None:
        """Add the gradient of `strength * penalty` to the gradients of gates and weight."""
        parameters = [p for p in (*self.gates(), weight) if p.requires_grad]
        if not parameters:
            return
        with torch.enable_grad():
            penalty = self.penalty(weight)
            gradients = torch.autograd.grad(penalty, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                accumulate(parameter, gradient, strength)

    # The border between kept and dropped, for control of the sparsity.

    def margins(self, weight: Tensor) -> Tensor:
        """How far each gate is from dropping its weights, of the gates' shape; kept where > 0."""
        raise NotImplementedError(f"the gates of {type(self).__name__} have no border")

    def put_across(self, weight: Tensor, gates: Tensor, *, keep: bool) -> None:
        """Put the gates at these flat indices just across the border."""
        raise NotImplementedError(f"the gates of {type(self).__name__} cannot be put")

    def revive(self, weight: Tensor, rows: Part, gates: Part) -> None:
        """Take up the gate again that is nearest to its border, of a layer that lost all.

        Args:
            weight: its rows that are here.
            rows, gates: the parts of weight and gates that are here.
        """
        self.put_across(weight, nearest_kept(self.margins(weight), gates), keep=True)

    def restore(self, mask: Tensor) -> None:
        """Take over the mask of a checkpoint, for a mask that does not follow from gates alone."""

    def constrain(self) -> None:
        """Bring the gates back into their range, after the optimizer stepped."""


class MaskFunction(torch.autograd.Function):
    """What the forward passes of learned masks are made of: autograd functions that `vmap` takes.

    torch asks for the signature of `forward` at each call, to bind the arguments. Working it out
    takes as long as a small layer; when it is there, torch takes it.
    """

    generate_vmap_rule = True

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]


def gate_dtype(weight: Tensor) -> torch.dtype:
    """What gates of a weight are made of: no less than float32, whose steps they need."""
    return torch.promote_types(weight.dtype, torch.float32)


def gates_like(weight: Tensor, start: Tensor) -> Tensor:
    """The start of gates, where the weight is."""
    return start.to(device=weight.device, dtype=gate_dtype(weight))


def accumulate(parameter: Parameter, gradient: Tensor, factor: float = 1.0) -> None:
    """Add `factor * gradient` to the gradient of a parameter, unless that is frozen."""
    if not parameter.requires_grad:
        return
    if parameter.grad is None:
        parameter.grad = (gradient * factor).to(parameter.dtype)
    else:
        parameter.grad.add_(gradient, alpha=factor)


def where_positive(values: Tensor) -> Tensor:
    """1 where a value is above 0, else 0, of the values' type; writes over `values`.

    On a CPU two passes over floats are several times faster than a comparison.
    """
    return values.relu_().sign_()


def keep_positive(values: Tensor, margins: Tensor) -> Tensor:
    """Values where the margin is above 0, else exactly 0, whatever the value is.

    The gradient of a rectifier does just that in one pass; `torch.where` takes four times as long.
    """
    kept: Tensor = torch.ops.aten.threshold_backward(values, margins, 0.0)
    return kept


def nearest_kept(margins: Tensor, part: Part) -> Tensor:
    """Flat index of the largest margin, as a vector; empty on ranks that do not have it."""
    if part.is_whole:
        return margins.argmax().view(1)
    # Weights of 0 have infinite margins, which have no rank.
    finite = torch.nan_to_num(margins.reshape(-1))
    return top_k(finite, 1, part=part).nonzero().view(-1)


def put(parameter: Parameter, indices: Tensor, border: Tensor | float, *, above: bool) -> None:
    """Set entries just above or below their border."""
    places = torch.unravel_index(indices, parameter.shape)
    parameter.detach()[places] = border + (_STEP if above else -_STEP)
