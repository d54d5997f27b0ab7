"""Bookkeeping over training: mean densities for FLOPs, explored weights for events."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from sparsetrain.storage.bits import pack_mask, unpack_mask
from sparsetrain.storage.csr.target import CsrTarget
from sparsetrain.targets import SparseTarget


class Tracker:
    """Counts what each layer's zeros saved and, if asked, which weights were ever active.

    The first costs an addition or two a layer a step. The second costs one bit a weight and is
    switched on by the first listener.

    Attributes:
        idle: layer -> inactive weights, summed over the steps.
        idle_with_gradient: the same over the steps that took the dense gradient all the same.
        explored: layer -> the weights that were ever active, or None: bits (uint8), or sorted flat
            indices (int64) for weights that are not held densely.
    """

    def __init__(self) -> None:
        self.idle: dict[str, int] = {}
        self.idle_with_gradient: dict[str, int] = {}
        self.explored: dict[str, torch.Tensor] | None = None

    def count_step(self, targets: Iterable[SparseTarget], dense_gradient: bool) -> None:
        """Add one training step: inactive weights, and whether it took the dense gradient."""
        for target in targets:
            name, idle = target.name, target.resting
            self.idle[name] = self.idle.get(name, 0) + idle
            if dense_gradient:
                self.idle_with_gradient[name] = self.idle_with_gradient.get(name, 0) + idle

    def history(self, target: SparseTarget, steps: int) -> tuple[float, float]:
        """Mean density over the steps so far, and the mean share of weights that were inactive but
        took a gradient. A weight counts as dense before it became a target."""
        if steps == 0:
            return target.density, 0.0
        name, weight_steps = target.name, steps * target.numel
        mean = 1.0 - self.idle.get(name, 0) / weight_steps
        return mean, self.idle_with_gradient.get(name, 0) / weight_steps

    def explore(self, targets: Iterable[SparseTarget]) -> None:
        """Take the active weights into the ever-active set (begins it at the first call)."""
        if self.explored is None:
            self.explored = {}
        for target in targets:
            seen = self.explored.get(target.name)
            self.explored[target.name] = _joined(target, seen)

    def narrow(self, target: SparseTarget, dim: int, keep: torch.Tensor) -> None:
        """Follow a target of which nothing but `keep` will be left along `dim`.

        Its mean densities so far stay what they are; of the explored weights those stay that are
        left.
        """
        share = Fraction(keep.numel(), target.shape[dim])
        for counted in (self.idle, self.idle_with_gradient):
            if target.name in counted:
                counted[target.name] = round(share * counted[target.name])
        if self.explored is not None and target.name in self.explored:
            seen = self.explored[target.name]
            self.explored[target.name] = _left(seen, target.shape, dim, keep.cpu())

    def exploration_rate(self, total: int) -> float:
        """Share of all target weights that were ever active, in [0, 1]; NaN when not tracked."""
        if self.explored is None:
            return float("nan")
        return sum(_count(seen) for seen in self.explored.values()) / total

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and tensors for the checkpoint."""
        return {
            "idle": dict(self.idle),
            "idle_with_gradient": dict(self.idle_with_gradient),
            "explored": None if self.explored is None else dict(self.explored),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`; what is not followed in the saved run begins anew."""
        self.idle = dict(state["idle"])
        self.idle_with_gradient = dict(state["idle_with_gradient"])
        if (explored := state["explored"]) is not None:
            self.explored = {n: bits.to("cpu", copy=True) for n, bits in explored.items()}
        elif self.explored is not None:
            self.explored = {}


def _joined(target: SparseTarget, seen: torch.Tensor | None) -> torch.Tensor:
    """The weights of `seen` and those that are active now."""
    if seen is None:
        is_dense = not isinstance(target, CsrTarget)
        return pack_mask(target.held_mask) if is_dense else target.active_indices()
    if seen.dtype == torch.uint8:
        return seen | pack_mask(target.held_mask)
    joined: torch.Tensor = torch.unique(torch.cat([seen, target.active_indices()]))
    return joined


def _left(seen: torch.Tensor, shape: tuple[int, ...], dim: int, keep: torch.Tensor) -> torch.Tensor:
    """The explored weights among those at `keep` along `dim`, in the same form."""
    if seen.dtype == torch.uint8:
        return pack_mask(unpack_mask(seen, shape).index_select(dim, keep))
    flags = torch.zeros(shape, dtype=torch.bool)
    flags.view(-1)[seen] = True
    return flags.index_select(dim, keep).view(-1).nonzero().view(-1)


def _count(seen: torch.Tensor) -> int:
    if seen.dtype == torch.uint8:
        return int(np.bitwise_count(seen.numpy()).sum())
    return seen.numel()
