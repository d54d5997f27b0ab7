"""Channels out of the tensors of a model, and out of the state of its optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from sparsetrain.channels.coupling import Coupling
from sparsetrain.channels.sides import Side, counts


def replace_data(parameter: Parameter, data: Tensor) -> None:
    """Give a parameter values of another shape; its gradient goes."""
    parameter.grad = None
    # Autograd's node that collects the gradient remembers the old shape while any graph has it; it
    # is let go when the type of the values changes.
    other = torch.float64 if data.dtype != torch.float64 else torch.float32
    parameter.data = data.new_empty(0, dtype=other)
    parameter.data = data


class _Cut(NamedTuple):
    """What a tensor loses along a dimension."""

    module: nn.Module
    leaf: str
    tensor: Tensor
    dim: int
    places: set[int]


@torch.no_grad()
def remove(chosen: Mapping[str, Sequence[int]], of: Iterable[Coupling], optimizer: Any) -> None:
    """Take channels out of every layer that has them, in place.

    Parameters stay the same objects, so that an optimizer goes on with them.

    Args:
        chosen: name of a coupling -> its channels to remove.
        of: the couplings of the model.
        optimizer: whose state loses the same slices; or None.
    """
    sides = [(side, chosen[c.name]) for c in of if c.name in chosen for side in c.sides]
    # All positions of a tensor at once: several couplings may have parts of one dimension (after a
    # concatenation), and several layers may share a weight.
    cuts: dict[tuple[int, int], _Cut] = {}
    for side, channels in sides:
        for leaf, dim in side.slices():
            tensor = getattr(side.module, leaf)
            cut = cuts.setdefault((id(tensor), dim), _Cut(side.module, leaf, tensor, dim, set()))
            cut.places.update(side.positions(channels))
    for cut in cuts.values():
        keep = _others(cut.places, cut.tensor.shape[cut.dim], cut.tensor.device)
        if isinstance(cut.tensor, Parameter):
            _shrink(cut.tensor, cut.dim, keep, optimizer)
        else:
            setattr(cut.module, cut.leaf, cut.tensor.index_select(cut.dim, keep))
    for side, _ in sides:
        for attribute, value in counts(side.module).items():
            setattr(side.module, attribute, value)


@torch.no_grad()
def silence(chosen: Mapping[str, Sequence[int]], of: Iterable[Coupling]) -> None:
    """Set to 0 what makes channels, in place, without removing them.

    The model then gives what the smaller one gives, unless a norm looks at several channels
    together or a function between two layers does not map 0 to 0.

    Args:
        chosen: name of a coupling -> channels.
        of: the couplings of the model.
    """
    for coupling in of:
        for side in coupling.sides:
            if coupling.name in chosen and side.role != "in":
                _silence(side, chosen[coupling.name])


def _silence(side: Side, channels: Sequence[int]) -> None:
    for leaf, dim in side.slices():
        if leaf in ("weight", "bias"):
            tensor: Tensor = getattr(side.module, leaf)
            places = torch.tensor(side.positions(channels), dtype=torch.int64, device=tensor.device)
            tensor.index_fill_(dim, places, 0.0)


def _others(drop: Iterable[int], size: int, device: torch.device) -> Tensor:
    kept = torch.ones(size, dtype=torch.bool)
    kept[list(drop)] = False
    return kept.nonzero().view(-1).to(device)


def _shrink(parameter: Parameter, dim: int, keep: Tensor, optimizer: Optimizer | None) -> None:
    shape = parameter.shape
    gradient = parameter.grad
    replace_data(parameter, parameter.data.index_select(dim, keep))
    if gradient is not None:
        parameter.grad = gradient.index_select(dim, keep)
    # Without a list of optimizers: what has the parameter's shape is a number for each weight.
    state: dict[str, Any] = optimizer.state[parameter] if optimizer else {}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == shape:
            state[key] = value.index_select(dim, keep)
