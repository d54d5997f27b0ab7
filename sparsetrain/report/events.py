"""What a policy tells the world after each mask update."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerChange:
    """What one update did to one target (net numbers: a weight dropped and regrown counts 0)."""

    name: str
    dropped: int
    grown: int
    active: int
    total: int


@dataclass(frozen=True)
class UpdateEvent:
    """One mask update, for any logger.

    Attributes:
        step: clock at the update (optimizer steps completed before it).
        sparsity: share of zeros over all targets, in [0, 1].
        exploration_rate: share of all target weights that were ever active since tracking began
            (R_s of Liu et al. 2021, "Do we actually need dense over-parameterization?", ITOP).
        layers: the targets that this update looked at.
    """

    step: int
    sparsity: float
    exploration_rate: float
    layers: tuple[LayerChange, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)

    def scalars(self, prefix: str = "sparsity/") -> dict[str, float]:
        """Flat numbers for TensorBoard- or W&B-like loggers."""
        return {
            f"{prefix}total": self.sparsity,
            f"{prefix}exploration_rate": self.exploration_rate,
            f"{prefix}dropped": float(sum(layer.dropped for layer in self.layers)),
            f"{prefix}grown": float(sum(layer.grown for layer in self.layers)),
        } | {f"{prefix}{layer.name}": 1 - layer.active / layer.total for layer in self.layers}
