"""As many weights as a target leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.candidates import Candidate, plain_name
from sparsetrain.cost.budget import Budget
from sparsetrain.cost.layers import LayerUse, layers_used
from sparsetrain.cost.targets import CostTarget
from sparsetrain.pruning.sequence import weights_back

Masks = dict[str, Tensor]


@dataclass(frozen=True)
class MaskBound:
    """A target for one network, whatever masks it has."""

    budget: Budget
    model: nn.Module
    candidates: Sequence[Candidate]
    layers: Sequence[LayerUse]

    @classmethod
    def of(
        cls,
        target: CostTarget | Mapping[str, Any],
        model: nn.Module,
        candidates: Sequence[Candidate],
        example_inputs: Any,
    ) -> MaskBound:
        """Look at the network as it is.

        Raises:
            ValueError: the target needs inputs, and there are none.
        """
        budget = Budget.of(target, model, example_inputs)
        layers = layers_used(model, example_inputs) if budget.target.needs_inputs else []
        return cls(budget, model, candidates, layers)

    @torch.no_grad()
    def cost(self, masks: Mapping[str, Tensor]) -> float:
        """What the network costs behind these masks."""
        cost = self.budget.of_layers(lambda: thinned(self.layers, densities(masks)))
        if cost is not None:
            return cost
        with weights_back(self.candidates):
            for candidate in self.candidates:
                candidate.param.masked_fill_(~masks[candidate.name], 0.0)
            return self.budget.of_model(self.model)

    def holds(self, masks: Mapping[str, Tensor]) -> bool:
        """Whether it may cost that."""
        return self.budget.holds(self.cost(masks))


def densities(masks: Mapping[str, Tensor]) -> dict[str, float]:
    """Name of a weight -> share that its mask keeps."""
    return {n: int(mask.count_nonzero()) / max(mask.numel(), 1) for n, mask in masks.items()}


def thinned(layers: Sequence[LayerUse], density: Mapping[str, float]) -> list[LayerUse]:
    """The layers with other shares of non-zeros in the weights that `density` names."""
    by_name = {plain_name(name): share for name, share in density.items()}
    return [replace(use, density=by_name.get(use.name, use.density)) for use in layers]


def masks_within(
    bound: MaskBound, masks_at: Callable[[float], Masks], least: int, numel: int
) -> Masks:
    """The masks that keep the most weights among those whose network costs no more than allowed.

    The count is found by bisection, to a single weight (or as few as the structure allows).

    Args:
        masks_at: masks for a sparsity.
        least: weights that are kept at least.
        numel: weights in all.

    Raises:
        ValueError: not even the least is enough; says how much that costs.
    """
    low, high = least, numel
    best = masks_at(1 - low / numel)
    if not bound.holds(best):
        kept = sum(int(mask.count_nonzero()) for mask in best.values())
        reason = bound.budget.out_of_reach(f"with {kept} weights left", bound.cost(best))
        raise ValueError(f"{reason}: ask for more than that, or let more weights go (match)")
    whole = masks_at(0.0)
    if bound.holds(whole):
        return whole
    while high - low > 1:
        middle = (low + high) // 2
        masks = masks_at(1 - middle / numel)
        if bound.holds(masks):
            low, best = middle, masks
        else:
            high = middle
    return best
