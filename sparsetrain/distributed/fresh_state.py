"""Steps that only make an optimizer's state, as `torch.distributed.checkpoint` takes them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparsetrain.distributed.part import part_of


def makes_state_only(base: Optimizer) -> bool:
    """Whether the next step would change nothing: no state yet, learning rates and gradients 0.

    `get_state_dict` and `set_state_dict` take such a step, so that a fresh optimizer has a state to
    load into. It is none of training, for masks and their clock. Every rank decides alike.
    """
    if base.state or any(float(group.get("lr", 1.0)) for group in base.param_groups):
        return False
    held = [param.grad for group in base.param_groups for param in group["params"]]
    gradients = [gradient for gradient in held if gradient is not None]
    return bool(gradients) and not _count_nonzero(gradients)


@torch.no_grad()
def _count_nonzero(gradients: list[Tensor]) -> int:
    parts = [part_of("a gradient", gradient) for gradient in gradients]
    here = sum(
        int(torch.count_nonzero(part.held(gradient)))
        for part, gradient in zip(parts, gradients, strict=True)
    )
    sharded = [part for part in parts if not part.is_whole]
    return sharded[0].totals(here)[0] if sharded else here
