"""What pruning a trained network gives."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsetrain.candidates import find_candidates
from sparsetrain.distributed.averaging import reshard
from sparsetrain.optimizer import SparseOptimizer
from sparsetrain.part import part_of
from sparsetrain.policies import Static
from sparsetrain.recipe import Recipe, Rule
from sparsetrain.report.text import as_text


@dataclass(frozen=True)
class PruneResult:
    """Masks for the weights of a model, which is as it was until `apply` or `hold`.

    Attributes:
        model: the model.
        masks: name -> bool tensor of the weight's shape, True where kept; sharded as the weight is.
        score: kind of the score, or name of the method.
        weights: what the kept weights become, for methods that change them; None: they stay.
        kept: name -> number of weights that are kept, over all ranks.
    """

    model: nn.Module
    masks: dict[str, Tensor]
    score: str
    weights: dict[str, Tensor] | None = None
    kept: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        # Counted here, where all ranks are: afterwards one of them may print the table.
        object.__setattr__(
            self, "kept", {name: _count(name, mask) for name, mask in self.masks.items()}
        )

    @property
    def sparsity(self) -> float:
        """Share of zeros over all masks, in [0, 1]."""
        kept = sum(self.kept.values())
        return 1 - kept / sum(mask.numel() for mask in self.masks.values())

    @torch.no_grad()
    def apply(self) -> nn.Module:
        """Set the pruned weights to exactly 0 (and the others anew), in place.

        Returns:
            The model.
        """
        reshard(self.model)
        params = {candidate.name: candidate.param for candidate in find_candidates(self.model)}
        for name, mask in self.masks.items():
            part = part_of(name, params[name])
            here = part.held(params[name])
            if self.weights is not None:
                here.copy_(part.held(self.weights[name]))
            here.masked_fill_(~part.held(mask).to(here.device), 0.0)
        return self.model

    def hold(
        self, optimizer: Optimizer, *, seed: int = 0, storage: str = "masked"
    ) -> SparseOptimizer:
        """`apply`, and keep the zeros while `optimizer` trains the other weights.

        Args:
            optimizer: any torch optimizer over the model's parameters.
            storage: as for `SparseOptimizer`.
        """
        reshard(self.model)
        params = [c.param for c in find_candidates(self.model) if c.name in self.masks]
        before = [param.detach().clone() for param in params]
        self.apply()
        try:
            return SparseOptimizer(optimizer, self.model, self.recipe(), seed=seed, storage=storage)
        except Exception:
            with torch.no_grad():
                for param, weight in zip(params, before, strict=True):
                    param.copy_(weight)
            raise

    def recipe(self) -> Recipe:
        """A rule with a `Static` mask for each weight; other weights stay dense.

        A recipe is the same everywhere and has whole masks, a bit a weight: of sharded masks one
        after the other is gathered (never a weight), so that all ranks have to call this.
        """
        rules = [
            Rule(regex=f"^{re.escape(name)}$", policy=Static(masks={name: _whole(mask)}))
            for name, mask in self.masks.items()
        ]
        return Recipe(rules=tuple(rules))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON: the table, not the masks."""
        layers = [
            {"name": name, "shape": list(mask.shape), "kept": self.kept[name]}
            for name, mask in self.masks.items()
        ]
        return {"score": self.score, "sparsity": self.sparsity, "layers": layers}

    def __rich__(self) -> Table:
        title = f"pruned by {self.score}: {self.sparsity:.2%} sparse"
        table = Table(title=title, title_justify="left")
        for heading in ("layer", "shape"):
            table.add_column(heading)
        for heading in ("density", "kept", "weights"):
            table.add_column(heading, justify="right")
        for name, mask in self.masks.items():
            kept, numel = self.kept[name], mask.numel()
            shape = " x ".join(map(str, mask.shape))
            table.add_row(name, shape, f"{kept / numel:.4f}", f"{kept:,}", f"{numel:,}")
        return table

    def __str__(self) -> str:
        return as_text(self)


def _count(name: str, mask: Tensor) -> int:
    part = part_of(name, mask)
    return part.totals(int(part.held(mask).count_nonzero()))[0]


def _whole(mask: Tensor) -> Tensor:
    whole: Tensor = mask.full_tensor() if hasattr(mask, "full_tensor") else mask
    return whole
