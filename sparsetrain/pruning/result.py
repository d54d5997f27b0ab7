"""What pruning a trained network gives."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsetrain.candidates import find_candidates
from sparsetrain.optimizer import SparseOptimizer
from sparsetrain.policies import Static
from sparsetrain.recipe import Recipe, Rule
from sparsetrain.report.text import as_text


@dataclass(frozen=True)
class PruneResult:
    """Masks for the weights of a model, which is as it was until `apply` or `hold`.

    Attributes:
        model: the model.
        masks: name -> bool tensor of the weight's shape, True where kept.
        score: kind of the score, or name of the method.
        weights: what the kept weights become, for methods that change them; None: they stay.
    """

    model: nn.Module
    masks: dict[str, Tensor]
    score: str
    weights: dict[str, Tensor] | None = None

    @property
    def sparsity(self) -> float:
        """Share of zeros over all masks, in [0, 1]."""
        kept = sum(int(mask.count_nonzero()) for mask in self.masks.values())
        return 1 - kept / sum(mask.numel() for mask in self.masks.values())

    @torch.no_grad()
    def apply(self) -> nn.Module:
        """Set the pruned weights to exactly 0 (and the others anew), in place.

        Returns:
            The model.
        """
        params = {candidate.name: candidate.param for candidate in find_candidates(self.model)}
        for name, mask in self.masks.items():
            if self.weights is not None:
                params[name].copy_(self.weights[name])
            params[name].masked_fill_(~mask.to(params[name].device), 0.0)
        return self.model

    def hold(
        self, optimizer: Optimizer, *, seed: int = 0, storage: str = "masked"
    ) -> SparseOptimizer:
        """`apply`, and keep the zeros while `optimizer` trains the other weights.

        Args:
            optimizer: any torch optimizer over the model's parameters.
            storage: as for `SparseOptimizer`.
        """
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
        """A rule with a `Static` mask for each weight; other weights stay dense."""
        rules = [
            Rule(regex=f"^{re.escape(name)}$", policy=Static(masks={name: mask}))
            for name, mask in self.masks.items()
        ]
        return Recipe(rules=tuple(rules))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON: the table, not the masks."""
        layers = [
            {"name": name, "shape": list(mask.shape), "kept": int(mask.count_nonzero())}
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
            kept, numel = int(mask.count_nonzero()), mask.numel()
            shape = " x ".join(map(str, mask.shape))
            table.add_row(name, shape, f"{kept / numel:.4f}", f"{kept:,}", f"{numel:,}")
        return table

    def __str__(self) -> str:
        return as_text(self)
