"""SNFS: drop by magnitude, redistribute and grow by momentum (Dettmers & Zettlemoyer 2019)."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sparsetrain._apportion import apportion
from sparsetrain.policies.base import DynamicPolicy
from sparsetrain.policies.engine import is_unstructured
from sparsetrain.policies.group import TargetGroup
from sparsetrain.schedules import CosineFraction, as_schedule
from sparsetrain.targets import ExchangeTarget

#: Layers with fewer zeros than this drop at most their share of zeros while they grow.
_NEARLY_DENSE = 0.2


class SNFS(DynamicPolicy):
    """Sparse networks from scratch: sparse momentum (Dettmers & Zettlemoyer 2019, Algorithm 2).

    Each layer drops the same share of its smallest weights; the freed connections go to layers
    in proportion to the mean momentum magnitude of their active weights, and grow where the
    momentum of inactive weights is largest. The momentum is this policy's own running mean of the
    dense gradient, 4 bytes a weight, because the base optimizer's holds only active weights.
    """

    kind: Literal["snfs"] = "snfs"
    dense_gradient: ClassVar[Literal["never", "updates", "always"]] = "always"

    drop_fraction: CosineFraction = Field(
        default_factory=lambda: as_schedule(0.5, "cosine"),
        description="share of active weights replaced at an update, in [0, 1]; a number decays "
        "to 0 as a cosine",
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="decay of the running mean gradient")

    @model_validator(mode="after")
    def _is_unstructured(self) -> SNFS:
        if not is_unstructured(self.structure):
            raise ValueError("SNFS moves single weights between layers: leave 'structure' out")
        return self

    def needs_dense_gradient(self, step: int) -> bool:
        """Until the last update; the momentum is not followed any longer."""
        return step < self.stop_step()

    def target_densities(self, group: TargetGroup) -> dict[str, float]:
        """None: momentum decides which layer gets how many."""
        return {}

    def observe(self, group: TargetGroup, step: int) -> None:
        """Follow the dense gradient while updates are still to come."""
        if step >= self.stop_step():
            group.memory.clear()
            return
        for target in group.exchangeable:
            gradient = target.whole_gradient()
            if gradient is None:
                continue
            # A NaN of one batch would stay in the running mean for good.
            gradient = torch.nan_to_num(target.part.held(gradient), 0.0, 0.0, 0.0)
            mean = group.memory.get(target.name)
            mean = torch.zeros_like(gradient) if mean is None else target.part.held(mean)
            mean = mean.to(gradient.dtype).lerp_(gradient, 1 - self.momentum)
            group.memory[target.name] = target.part.wrap(mean)

    def remembers(self, group: TargetGroup) -> dict[str, Tensor]:
        """The momentum of every weight."""
        return {t.name: torch.zeros_like(t.param.detach()) for t in group.exchangeable}

    def update_masks(self, group: TargetGroup, step: int) -> None:
        """Drop everywhere, then grow where momentum is large."""
        fraction = self.drop_fraction.at(self.progress(step))
        targets = [target for target in group.exchangeable if target.name in group.memory]
        if not targets:
            targets = group.with_gradients(self.kind)  # no step yet: the gradient that is there
        momenta = {t.name: _momentum_of(t, group) for t in targets}
        claims = _claims(targets, momenta)
        counts = {t.name: _drop_count(t, fraction, claims) for t in targets}
        room = {t.name: t.numel - t.active + counts[t.name] for t in targets}
        growth = _redistribute(claims, room, sum(counts.values()))
        for target in targets:
            name = target.name
            dropped = target.least_active(counts[name])
            grown = target.largest_free(momenta[name], growth[name], dropped)
            group.exchange(target, dropped, grown)


def _momentum_of(target: ExchangeTarget, group: TargetGroup) -> Tensor:
    """The momentum, of the weight's shape."""
    mean: Tensor | None = group.memory.get(target.name)
    if mean is None:
        mean = target.whole_gradient()
    assert mean is not None  # asked of targets that have one of them
    return mean


def _claims(targets: list[ExchangeTarget], momenta: dict[str, Tensor]) -> dict[str, float]:
    """Share of the growth for each layer: its mean momentum magnitude over active weights."""
    means = {}
    for target in targets:
        momentum = target.part.held(momenta[target.name])
        active = momentum.reshape(-1)[target.active_indices()]
        size = target.part.sum(active.double().abs_().sum().cpu())
        mean = float(size) / max(target.active, 1)
        if not mean < math.inf:
            raise ValueError(f"the momentum of {target.name} is NaN or infinite")
        means[target.name] = mean
    total = sum(means.values())
    return {name: mean / total if total else 1 / len(means) for name, mean in means.items()}


def _drop_count(target: ExchangeTarget, fraction: float, claims: dict[str, float]) -> int:
    """Connections that a layer drops, rounded up as in the authors' code.

    A nearly dense layer that claims more than an equal share would only regrow what it drops.
    """
    zeros = 1 - target.density
    if zeros < _NEARLY_DENSE and claims[target.name] > 1 / len(claims):
        fraction = min(fraction, zeros)
    return min(math.ceil(fraction * target.active), target.active)


def _redistribute(claims: dict[str, float], room: dict[str, int], total: int) -> dict[str, int]:
    """`total` new connections shared by the layers' claims, none above its room."""
    names = [name for name, free in room.items() if free]
    if not names:  # all layers are dense, and stay so
        return dict.fromkeys(room, 0)
    # A layer without any momentum still has a tiny claim, for when the others are full.
    shares = [Fraction(max(claims[name], 1e-9)) for name in names]
    growth = apportion(shares, [room[name] for name in names], [1] * len(names), total)
    return dict.fromkeys(room, 0) | dict(zip(names, growth, strict=True))
