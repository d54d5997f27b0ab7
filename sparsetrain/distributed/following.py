"""Noticing that `fully_shard` has put sharded parameters in the place of those an optimizer has.

With learned masks the optimizer comes first, because it adds parameters that have to be sharded
too; and whoever prefers that order may keep it for all policies.
"""

from __future__ import annotations

from typing import Any

import torch.distributed
from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

from sparsetrain.base_state import shaped_state
from sparsetrain.part import part_of

#: A module, its name for a parameter, and the parameter.
Place = tuple[nn.Module, str, Parameter]


class Places:
    """Where a model has the parameters of an optimizer."""

    def __init__(self, model: nn.Module, base: Optimizer) -> None:
        held = {id(param) for group in base.param_groups for param in group["params"]}
        self._places: list[Place] = [
            (module, leaf, param)
            for module in model.modules()
            for leaf, param in module._parameters.items()
            if param is not None and id(param) in held and not _is_sharded(param)
        ]

    def replaced(self) -> list[tuple[Parameter, Parameter]]:
        """(old, new) of parameters that were whole when this was last asked and are sharded now."""
        if not (self._places and torch.distributed.is_available()):
            return []
        if not torch.distributed.is_initialized():
            return []
        found: list[tuple[Parameter, Parameter]] = []
        rest: list[Place] = []
        for module, leaf, old in self._places:
            new = module._parameters.get(leaf)
            if new is not None and new is not old and _is_sharded(new):
                found.append((old, new))
            else:
                rest.append((module, leaf, old))
        self._places = rest
        return found


def take_over(base: Optimizer, old: Parameter, new: Parameter) -> None:
    """Let an optimizer train `new` in the place of `old`, with what of its state is here."""
    for group in base.param_groups:
        group["params"][:] = [new if held is old else held for held in group["params"]]
    if old not in base.state:
        return
    state: dict[str, Any] = base.state.pop(old)
    part = part_of("a parameter", new)
    shaped = dict(shaped_state(state, old))
    base.state[new] = {
        key: part.wrap(part.held(value).clone()) if key in shaped else value
        for key, value in state.items()
    }


def _is_sharded(param: Parameter) -> bool:
    return hasattr(param, "placements")
