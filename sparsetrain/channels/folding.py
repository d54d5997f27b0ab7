"""What a channel still gives when its scale is 0 goes into the biases of the layers after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.batches import called
from sparsetrain.channels.coupling import Coupling
from sparsetrain.channels.sides import Side
from sparsetrain.convolution import CONVOLUTIONS
from sparsetrain.evaluating import evaluation_mode
from sparsetrain.scores.batch_norm_scale import norms_after


@torch.no_grad()
def fold(
    model: nn.Module,
    couplings: Sequence[Coupling],
    removed: Mapping[str, Sequence[int]],
    example_inputs: Any,
) -> None:
    """Set the scales of channels to 0, and add what they give then to the next biases, in place.

    Behind a batch normalisation whose scale is 0 a channel is its shift, a constant. What that adds
    to the next layer's outputs goes into its bias or, where it has none, into the running mean of
    the normalisation after it. This is exact except at borders that are padded with zeros.

    Args:
        removed: name of a coupling -> channels that will be removed.
        example_inputs: for one call of the model.

    Raises:
        ValueError: a next layer has neither a bias nor a normalisation, or is transposed.
    """
    losing = [c for c in couplings if removed.get(c.name)]
    for coupling in losing:
        for side in norms(coupling):
            side.module.weight[side.positions(removed[coupling.name])] = 0.0
    nexts = [(side, removed[c.name]) for c in losing for side in c.by_role("in")]
    constants = _mean_inputs(model, [side for side, _ in nexts], example_inputs)
    after = norms_after(model)
    for side, channels in nexts:
        places = [place for channel in channels for place in side.places[channel]]
        given = torch.zeros_like(constants[side.layer])
        given[places] = constants[side.layer][places]
        _shift(side, _added(side, given), after.get(id(side.module)))


def norms(coupling: Coupling) -> list[Side]:
    """The batch normalisations with a scale that the channels pass."""
    kind = nn.modules.batchnorm._BatchNorm
    through = coupling.by_role("through")
    return [s for s in through if isinstance(s.module, kind) and s.module.affine]


def _mean_inputs(model: nn.Module, sides: Sequence[Side], example_inputs: Any) -> dict[str, Tensor]:
    """Layer -> [inputs], means over samples and positions."""
    found: dict[str, Tensor] = {}

    def see(layer: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        given = args[0] if isinstance(module, nn.Linear) else args[0].movedim(1, -1)
        found[layer] = given.flatten(0, -2).mean(0)

    handles = [s.module.register_forward_pre_hook(partial(see, s.layer)) for s in sides]
    try:
        with evaluation_mode(model):
            called(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _added(side: Side, given: Tensor) -> Tensor:
    """[outputs]: what constant inputs, [inputs], add away from the border."""
    module = side.module
    if not isinstance(module, (nn.Linear, *CONVOLUTIONS)):
        raise ValueError(f"what goes into {side.layer} cannot be folded: it is transposed")
    weight = module.weight.flatten(2).sum(2) if module.weight.dim() > 2 else module.weight
    groups = getattr(module, "groups", 1)
    parts = weight.view(groups, -1, weight.shape[1]) @ given.view(groups, -1, 1)
    return parts.flatten()


def _shift(side: Side, added: Tensor, norm: Any) -> None:
    if side.module.bias is not None:
        side.module.bias += added
    elif norm is not None:
        norm.running_mean -= added
    else:
        raise ValueError(
            f"what goes into {side.layer} cannot be folded: it has no bias and no batch "
            "normalisation after it; leave fold out, or the channels before it by a rule"
        )
