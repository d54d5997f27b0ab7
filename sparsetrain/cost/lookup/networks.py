"""The networks that are timed: the model with fewer channels, and with sparse layers."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsetrain.batches import called
from sparsetrain.cost.lookup.layers import axis, random_mask
from sparsetrain.evaluating import evaluation_mode
from sparsetrain.storage.csr.convert import sparsify

if TYPE_CHECKING:
    pass


def narrower(
    model: nn.Module, example_inputs: Any, step: int, channels_last: bool
) -> list[nn.Module]:
    """Copies with fewer channels, so that each layer is seen in each width of its axis.

    Layers get their widths in different orders, drawn with a fixed seed. Empty if torch-pruning is
    not installed; with a warning, too, if channels cannot be removed.
    """
    from sparsetrain.channels import couplings  # which knows costs itself
    from sparsetrain.channels.cutting import cut_to

    try:
        found = couplings(model, example_inputs)
        orders = _orders({coupling.name: axis(coupling.channels, step) for coupling in found})
        networks = [cut_to(model, found, counts) for counts in orders]
        if channels_last:
            networks = [_to_channels_last(network) for network in networks]
        for network in networks:
            with evaluation_mode(network), torch.no_grad():
                called(network, example_inputs)
    except ImportError:
        return []
    except (ValueError, RuntimeError) as error:
        warnings.warn(
            f"no narrower copies of the network could be timed ({error}): with fewer channels, "
            "predictions know of the layers alone",
            stacklevel=2,
        )
        return []
    return networks


def _orders(axes: Mapping[str, Sequence[int]]) -> list[dict[str, int]]:
    """For as many networks as the longest axis has points, channels by name."""
    number = max(map(len, axes.values()), default=0)
    generator = random.Random(0)
    columns = {}
    for name, points in axes.items():
        spread = [points[k * len(points) // number] for k in range(number)]
        columns[name] = generator.sample(spread, number)
    return [{name: column[k] for name, column in columns.items()} for k in range(number)]


def _to_channels_last(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def with_sparsity(model: nn.Module, sparsities: Mapping[str, float]) -> nn.Module:
    """A copy whose named layers are held sparse, with random non-zeros."""
    smaller = copy.deepcopy(model)
    for name, sparsity in sparsities.items():
        layer = smaller.get_submodule(name)
        weight = layer.weight
        assert isinstance(weight, Tensor)
        sparsify(layer, random_mask(weight.shape, sparsity))
    return smaller


@torch.no_grad()
def follows_layout(model: nn.Module, example_inputs: Any, sparse: Sequence[str]) -> set[str]:
    """Names of the linear layers that take the layout of a sparse one before them.

    Args:
        sparse: names of the layers that csr can hold.
    """
    following: set[str] = set()
    changed = with_sparsity(model, dict.fromkeys(sparse, 0.9))

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0] if args else None
            if isinstance(x, Tensor) and x.dim() == 2 and len(x) > 1 and x.stride() == (1, len(x)):
                following.add(name)

        return hook

    for name, module in changed.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(look(name))
    with evaluation_mode(changed):
        called(changed, example_inputs)
    return following
