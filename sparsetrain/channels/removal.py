"""Channels out of the tensors of a model, and out of the state of its optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from sparsetrain.channels.sides import Side, counts
from sparsetrain.narrowing import Cut, narrow_parameters
from sparsetrain.optimizer import SparseOptimizer

if TYPE_CHECKING:
    from sparsetrain.channels.coupling import Coupling


class _Loss(NamedTuple):
    """What a tensor loses along a dimension."""

    module: nn.Module
    leaf: str
    tensor: Tensor
    dim: int
    places: set[int]

    def keep(self) -> Tensor:
        """The positions that stay, ascending."""
        kept = torch.ones(self.tensor.shape[self.dim], dtype=torch.bool)
        kept[list(self.places)] = False
        return kept.nonzero().view(-1).to(self.tensor.device)


@torch.no_grad()
def remove(chosen: Mapping[str, Sequence[int]], of: Iterable[Coupling], optimizer: Any) -> None:
    """Take channels out of every layer that has them, in place.

    Parameters stay the same objects, so that an optimizer goes on with them.

    Args:
        chosen: name of a coupling -> its channels to remove.
        of: the couplings of the model.
        optimizer: whose state, and masks if it is a `SparseOptimizer`, lose the same slices; or
            None.

    Raises:
        ValueError: masks cannot follow; nothing has changed.
    """
    losing = [coupling for coupling in of if coupling.name in chosen]
    sides = _losing(chosen, losing)
    losses = _losses(sides)
    if isinstance(optimizer, SparseOptimizer):
        optimizer.narrow(_cuts(losses))
    else:
        narrow_parameters(_cuts(losses), optimizer)
    for loss in losses:
        if not isinstance(loss.tensor, Parameter):
            setattr(loss.module, loss.leaf, loss.tensor.index_select(loss.dim, loss.keep()))
    for side, _ in sides:
        for attribute, value in counts(side.module).items():
            setattr(side.module, attribute, value)
    for coupling in losing:
        if coupling.heads is not None:
            coupling.heads.recount(coupling.by_role("in")[0].size)


def check_plain(model: nn.Module) -> None:
    """Raise ValueError if weights are behind parametrizations, which cannot lose channels."""
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            raise ValueError(
                f"{name} is behind a parametrization: finalize() the optimizer or remove it first"
            )


def check_optimizer(optimizer: Any) -> None:
    """Refuse an optimizer that cannot follow, whatever channels are removed.

    Raises:
        ValueError: it holds weights that cannot lose channels, or is wrapped by one that holds
            masks.
    """
    if isinstance(optimizer, SparseOptimizer):
        optimizer.check_narrowing()
    elif isinstance(optimizer, Optimizer):
        hooks = optimizer._optimizer_step_pre_hooks.values()
        if any(isinstance(getattr(hook, "__self__", None), SparseOptimizer) for hook in hooks):
            raise ValueError("the optimizer is wrapped by a SparseOptimizer: give that one")


def check_removal(
    model: nn.Module,
    changed: Mapping[str, Tensor],
    chosen: Mapping[str, Sequence[int]],
    of: Iterable[Coupling],
    optimizer: Any,
) -> None:
    """Refuse a removal that the masks of a `SparseOptimizer` cannot follow; nothing changes.

    Args:
        changed: the state dict that the model gets before channels are removed.
        chosen: name of a coupling -> its channels to remove.
        of: the couplings of the model.

    Raises:
        ValueError: masks cannot follow, or `changed` has other weights where they are inactive.
    """
    if not isinstance(optimizer, SparseOptimizer):
        return
    optimizer.check_narrowing(_cuts(_losses(_losing(chosen, of))))
    targets = {id(target.param): target for target in optimizer.targets.values()}
    for name, parameter in model.named_parameters():
        if (target := targets.get(id(parameter))) is None:
            continue
        inactive = ~target.mask.to(parameter.device)
        if not changed[name][inactive].equal(parameter.detach()[inactive]):
            raise ValueError(
                f"the method changes weights of {target.name} that a mask holds at 0: choose "
                "another method, or finalize() the optimizer first"
            )


def _losing(
    chosen: Mapping[str, Sequence[int]], of: Iterable[Coupling]
) -> list[tuple[Side, Sequence[int]]]:
    return [(side, chosen[c.name]) for c in of if c.name in chosen for side in c.sides]


def _losses(sides: Iterable[tuple[Side, Sequence[int]]]) -> list[_Loss]:
    # All positions of a tensor at once: several couplings may have parts of one dimension (after a
    # concatenation), and several layers may share a weight.
    losses: dict[tuple[int, int], _Loss] = {}
    for side, channels in sides:
        for leaf, dim in side.slices():
            tensor = getattr(side.module, leaf)
            loss = losses.setdefault(
                (id(tensor), dim), _Loss(side.module, leaf, tensor, dim, set())
            )
            loss.places.update(side.positions(channels))
    return list(losses.values())


def _cuts(losses: Iterable[_Loss]) -> list[Cut]:
    return [Cut(x.tensor, x.dim, x.keep()) for x in losses if isinstance(x.tensor, Parameter)]


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
