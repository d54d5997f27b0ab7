"""What lottery tickets are compared with: their masks with fresh weights, and random masks."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def fresh_copy(model: nn.Module, seed: int) -> nn.Module:
    """A copy of the model with new initial weights, as its modules themselves make them.

    Raises:
        ValueError: a module has parameters and no `reset_parameters`.
    """
    fresh = copy.deepcopy(model)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, module in fresh.named_modules():
            # torch's attention calls it by another name.
            known = (getattr(module, n, None) for n in ("reset_parameters", "_reset_parameters"))
            reset = next((method for method in known if callable(method)), None)
            if reset is not None:
                reset()
            elif next(module.parameters(recurse=False), None) is not None:
                raise ValueError(
                    f"control 'fresh' cannot make new weights for {name or 'the model'}: give "
                    f"{type(module).__name__} a method reset_parameters()"
                )
    return fresh


def random_masks(masks: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Masks of the same counts, at random places of each layer."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, mask in masks.items():
        order = torch.randperm(mask.numel(), generator=generator).to(mask.device)
        shuffled = mask.reshape(-1)[order]
        found[name] = shuffled.reshape(mask.shape)
    return found
