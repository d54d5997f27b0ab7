"""MasterWeights: float32 copies of half-precision parameters, for any optimizer to train.

Half precision is too coarse to train in. A bfloat16 number has 8 significant bits, so an update
smaller than about 1/512 of its weight is rounded away, and small updates are most of training. With
masters, updates add up in float32, and the model computes with the rounded weights (Micikevicius
et al. 2018, "Mixed precision training", section 3.1).
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from sparsetrain._untraced import untraced

#: Parameters that get a master.
HALF = (torch.bfloat16, torch.float16)
#: Where it is in the state of its parameter.
MASTER = "master"

#: Parameter -> the master that stands for it within a step.
Masters = dict[Tensor, Tensor]


class MasterWeights(Optimizer):
    """Lets a torch optimizer train float32 masters of the parameters that are in half precision.

    After each step a parameter is its master, rounded. Whatever else writes to a parameter (masks,
    a loaded state dict) reaches its master at the next step, unless it writes what is there
    already. Parameters in other precisions are trained as they are. To train sparse, wrap the
    result: `SparseOptimizer(MasterWeights(optimizer), model, policy)`.

    Args:
        optimizer: over the model's parameters, which may be new or in use. It is part of this one
            from now on; parameter groups are shared, so schedulers built on it go on working.

    Attributes:
        inner: the optimizer.
        state: what the optimizer keeps for each parameter, in float32, and the `"master"` itself:
            4 bytes a parameter, and as many for its gradient during a step.

    Raises:
        TypeError: `optimizer` is not a torch optimizer, or is wrapped already.
    """

    inner: Optimizer

    def __init__(self, optimizer: Optimizer) -> None:
        _check(optimizer)
        # Optimizer.__init__ would make param groups of our own; its __setstate__ does the rest.
        super().__setstate__(
            {
                "inner": optimizer,
                "defaults": optimizer.defaults,
                "param_groups": optimizer.param_groups,
                "state": defaultdict(dict),
            }
        )
        self._adopt_state()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the optimizer on the masters; parameters are rounded to follow.

        Returns:
            What the closure returned, or None.
        """
        masters = untraced(self._begin)(closure is not None)
        try:
            if closure is None:
                return self.inner.step()
            return self.inner.step(lambda: untraced(self._evaluate)(closure, masters))
        finally:
            untraced(self._end)(masters)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more parameters, with options of their own or the optimizer's defaults."""
        self.inner.param_groups = self.param_groups
        self.inner.add_param_group(param_group)
        self._adopt_state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore masters and state, in the precision they were saved in.

        A state that was saved without masters is taken too; masters then begin as the parameters
        are.
        """
        seen: list[dict[str, Any]] = []

        def look(optimizer: Optimizer, loaded: dict[str, Any]) -> None:
            seen.append(loaded)

        def unround(optimizer: Optimizer) -> None:
            self._unround(seen[0])

        # torch casts state to the parameter's precision, in a function that it does not let
        # subclasses replace. Other hooks may change what is loaded, and want to see the result.
        before = self.register_load_state_dict_pre_hook(look)
        after = self.register_load_state_dict_post_hook(unround, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    # Copying and pickling: hooks are left out, as torch does.

    def __getstate__(self) -> dict[str, Any]:
        """As of every torch optimizer, and the inner one."""
        return {
            "inner": self.inner,
            "defaults": self.defaults,
            "param_groups": self.param_groups,
            "state": self.state,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Inverse of `__getstate__`; torch calls it with loaded groups and state alone."""
        super().__setstate__(state)
        self._lend_state({})
        # Optimizers complete here what older versions of them have saved.
        self.inner.__setstate__({"param_groups": self.param_groups, "state": self.inner.state})
        self._adopt_state()

    def __copy__(self) -> MasterWeights:
        """A copy that shares groups and state, as that of other optimizers does."""
        copied = type(self).__new__(type(self))
        copied.__setstate__({**self.__getstate__(), "inner": copy.copy(self.inner)})
        return copied

    def _unround(self, loaded: dict[str, Any]) -> None:
        """Put back what was loaded, as it was saved."""
        saved = chain.from_iterable(group["params"] for group in loaded["param_groups"])
        held = chain.from_iterable(group["params"] for group in self.param_groups)
        for number, param in zip(saved, held, strict=True):
            if _is_half(param) and number in loaded["state"]:
                kept = _unrounded(loaded["state"][number], device=param.device, copy=True)
                kept.pop("step", None)  # torch knows where that has to be
                self.state[param].update(kept)

    # The inner optimizer has state within a step alone, and masters in the place of parameters.

    def _adopt_state(self) -> None:
        """Take over state that the inner optimizer holds for parameters."""
        for param, kept in self.inner.state.items():
            if _is_half(param):
                self.state[param].update(_unrounded(kept))
            else:
                self.state[param] = kept
        self.inner.state = defaultdict(dict)

    def _begin(self, has_closure: bool) -> Masters:
        masters = self._masters(has_closure)
        self._lend_state(masters)
        self._lend(masters)
        return masters

    def _end(self, masters: Masters) -> None:
        self._take_back(masters)
        self._take_back_state(masters)

    @torch.no_grad()
    def _masters(self, has_closure: bool) -> Masters:
        """The masters of a step; a parameter gets one when it first has a gradient."""
        masters = {}
        for param in chain.from_iterable(group["params"] for group in self.param_groups):
            if not _is_half(param):
                continue
            master = self.state[param].get(MASTER) if param in self.state else None
            if master is not None:
                masters[param] = master
            elif param.grad is not None or (has_closure and param.requires_grad):
                masters[param] = param.detach().to(torch.float32)
        return masters

    def _lend_state(self, masters: Masters) -> None:
        self.inner.param_groups = self.param_groups
        self.inner.state = defaultdict(dict)
        for param, kept in self.state.items():
            if isinstance(param, Tensor):  # an empty state is that of a new parameter to many
                kept = {key: value for key, value in kept.items() if key != MASTER}
            self.inner.state[masters.get(param, param)] = kept

    def _take_back_state(self, masters: Masters) -> None:
        state, self.inner.state = self.inner.state, defaultdict(dict)
        for param, master in masters.items():
            self.state[param] = {MASTER: master, **state.pop(master, {})}
        self.state.update(state)

    @torch.no_grad()
    def _lend(self, masters: Masters) -> None:
        for param, master in masters.items():
            _follow(master, param)
            master.grad = None if param.grad is None else param.grad.to(torch.float32)
        self._exchange(masters)

    @torch.no_grad()
    def _take_back(self, masters: Masters) -> None:
        self._exchange({master: param for param, master in masters.items()})
        for param, master in masters.items():
            master.grad = None
            param.copy_(master)

    def _exchange(self, others: dict[Tensor, Tensor]) -> None:
        """Put others in the place of parameters; the lists stay the same, some keep hold of one."""
        for group in self.param_groups:
            group["params"][:] = [others.get(param, param) for param in group["params"]]

    def _evaluate(self, closure: Callable[[], Any], masters: Masters) -> Any:
        """The closure, which sees the parameters themselves."""
        self._take_back(masters)
        try:
            return closure()
        finally:
            self._lend(masters)


def _check(optimizer: Optimizer) -> None:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"MasterWeights takes a torch optimizer, not {type(optimizer).__name__}: "
            "MasterWeights(torch.optim.AdamW(model.parameters()))"
        )
    if isinstance(optimizer, MasterWeights):
        raise TypeError("this optimizer trains masters already: leave the second MasterWeights out")
    if isinstance(getattr(optimizer, "base", None), Optimizer):
        raise TypeError(
            f"put MasterWeights inside {type(optimizer).__name__}: "
            "SparseOptimizer(MasterWeights(optimizer), model, policy)"
        )


def _is_half(param: Any) -> bool:
    return isinstance(param, Tensor) and param.dtype in HALF


def _follow(master: Tensor, param: Tensor) -> None:
    """Take the master anew from its parameter, wherever something else has written to that."""
    held = param.detach()
    rounded = master.to(held.dtype)
    if not _have_the_same_bits(rounded, held):
        master.copy_(torch.where(rounded == held, master, held.to(master.dtype)))


def _have_the_same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of half precision are alike, where a look costs less than a copy."""
    if a.device.type != "cpu" or type(a) is not Tensor:
        return False
    return np.array_equal(a.view(torch.int16).numpy(), b.view(torch.int16).numpy())


def _unrounded(kept: Any, device: torch.device | None = None, copy: bool = False) -> Any:
    """State with no floating-point tensor below float32."""
    if isinstance(kept, Tensor):
        is_float = kept.is_floating_point()
        dtype = torch.promote_types(kept.dtype, torch.float32) if is_float else kept.dtype
        return kept.to(device=device, dtype=dtype, copy=copy)
    if isinstance(kept, dict):
        return {key: _unrounded(value, device, copy) for key, value in kept.items()}
    if isinstance(kept, list | tuple):
        return type(kept)(_unrounded(value, device, copy) for value in kept)
    return kept
