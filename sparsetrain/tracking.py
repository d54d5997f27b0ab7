"""Bookkeeping over training: mean densities for FLOPs, explored weights for events."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from sparsetrain.checkpoint import pack_mask
from sparsetrain.storage.masked import MaskedTarget


class Tracker:
    """Counts active-weight-steps a layer and, if asked, which weights were ever active.

    The first costs one addition a layer a step. The second costs one bit a weight and is
    switched on by the first listener.
    """

    def __init__(self) -> None:
        self.weight_steps: dict[str, int] = {}
        self.dense_steps: dict[str, int] = {}
        self.explored: dict[str, torch.Tensor] | None = None

    def count_step(self, targets: Iterable[MaskedTarget], dense_gradient: bool) -> None:
        """Add one training step: active weights, and whether it took the dense gradient."""
        for target in targets:
            name = target.name
            self.weight_steps[name] = self.weight_steps.get(name, 0) + target.active
            self.dense_steps[name] = self.dense_steps.get(name, 0) + dense_gradient

    def history(self, target: MaskedTarget, steps: int) -> tuple[float, float]:
        """Mean density over the steps so far, and the share of them with a dense gradient."""
        if steps == 0:
            return target.density, 0.0
        name = target.name
        mean = self.weight_steps.get(name, 0) / (steps * target.numel)
        return mean, self.dense_steps.get(name, 0) / steps

    def explore(self, targets: Iterable[MaskedTarget]) -> None:
        """Take the active weights into the ever-active set (begins it at the first call)."""
        if self.explored is None:
            self.explored = {}
        for target in targets:
            now = pack_mask(target.mask)
            seen = self.explored.get(target.name)
            self.explored[target.name] = now if seen is None else seen | now

    def exploration_rate(self, total: int) -> float:
        """Share of all target weights that were ever active, in [0, 1]; NaN when not tracked."""
        if self.explored is None:
            return float("nan")
        bits = sum(int(np.bitwise_count(p.numpy()).sum()) for p in self.explored.values())
        return bits / total

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and tensors for the checkpoint."""
        return {
            "weight_steps": dict(self.weight_steps),
            "dense_steps": dict(self.dense_steps),
            "explored": None if self.explored is None else dict(self.explored),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.weight_steps = dict(state["weight_steps"])
        self.dense_steps = dict(state["dense_steps"])
        explored = state["explored"]
        self.explored = None if explored is None else {k: v.clone() for k, v in explored.items()}
