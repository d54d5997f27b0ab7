"""What of a network is to be measured, and where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sparsetrain.batches import called
from sparsetrain.convolution import CONVOLUTIONS, TRANSPOSED
from sparsetrain.cost.layers import LayerUse, layers_used
from sparsetrain.cost.lookup.layers import Case, Setting, Shape, Storage, anonymous, cases
from sparsetrain.cost.lookup.networks import follows_layout
from sparsetrain.cost.machine import Machine
from sparsetrain.evaluating import evaluation_mode
from sparsetrain.storage.compress import shared_parameters
from sparsetrain.storage.csr.convert import why_not
from sparsetrain.storage.csr.layers import SparseLayer


@dataclass(frozen=True)
class Plan:
    """What is to be measured.

    Attributes:
        machine: where.
        setting: of all layers.
        inputs: sizes of the tensors that go into the network.
        step: of numbers of channels.
        sparsities: of csr weights, ascending.
        storages: that are measured.
        layers: uses of layers in the whole network, in order, as if dense.
        shapes: of the layers, each once.
        shape_of: for each of `layers`, the number of its shape.
    """

    machine: Machine
    setting: Setting
    inputs: tuple[tuple[int, ...], ...]
    step: int
    sparsities: tuple[float, ...]
    storages: tuple[Storage, ...]
    layers: tuple[LayerUse, ...]
    shapes: tuple[Shape, ...]
    shape_of: tuple[int, ...]

    def cases(self, shape: Shape) -> tuple[Case, ...]:
        """Everything to measure of a shape."""
        return tuple(cases(shape, self.step, self.sparsities, self.storages))

    @property
    def channels_last(self) -> bool:
        """Whether convolutions compute in that memory format."""
        return any(shape.channels_last for shape in self.shapes)


def input_sizes(example_inputs: Any) -> tuple[tuple[int, ...], ...]:
    """Sizes of the tensors that go into a network."""
    leaves = tree_leaves(example_inputs)
    return tuple(tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor))


def make_plan(
    model: nn.Module,
    example_inputs: Any,
    step: int,
    sparsities: Sequence[float],
    storages: Sequence[Storage],
) -> Plan:
    """Find the shapes of a network's layers.

    Raises:
        ValueError: it has no layers that could be measured.
    """
    uses = [replace(use, density=1.0) for use in layers_used(model, example_inputs)]
    held = _held_sparse(model) if "csr" in storages else set()
    follows = follows_layout(model, example_inputs, sorted(held)) if held else set()
    last = _in_channels_last(model, example_inputs)
    shapes = [
        Shape(anonymous(u), u.layer in last, u.layer in held, u.layer in follows) for u in uses
    ]
    distinct = tuple(dict.fromkeys(shapes))
    weight = next(p for p in model.parameters() if p.is_floating_point())
    sizes = input_sizes(example_inputs)
    dtype = str(weight.dtype).removeprefix("torch.")
    return Plan(
        Machine.here(weight.device),
        Setting(sizes[0][0], dtype, str(weight.device)),
        sizes,
        step,
        tuple(sorted(sparsities)),
        tuple(storages),
        tuple(uses),
        distinct,
        tuple(distinct.index(shape) for shape in shapes),
    )


def _held_sparse(model: nn.Module) -> set[str]:
    """Names of the layers that csr can hold, or holds."""
    shared = shared_parameters(model)
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, SparseLayer)
        or not (why_not(module) or id(module._parameters["weight"]) in shared)
    }


@torch.no_grad()
def _in_channels_last(model: nn.Module, example_inputs: Any) -> set[str]:
    """Names of the convolutions whose outputs are in that memory format."""
    found: set[str] = set()

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Tensor) -> None:
            last = out.dim() == 4 and out.is_contiguous(memory_format=torch.channels_last)
            if last and not out.is_contiguous():
                found.add(name)

        return hook

    kinds = (*CONVOLUTIONS, *TRANSPOSED)
    named = [(n, m) for n, m in model.named_modules() if isinstance(m, kinds)]
    handles = [module.register_forward_hook(look(name)) for name, module in named]
    try:
        with evaluation_mode(model):
            called(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def as_in(model: nn.Module, layer: LayerUse) -> LayerUse:
    """A layer as large and as dense as it is in a model.

    Raises:
        ValueError: the model has no such layer.
    """
    try:
        module: Any = model.get_submodule(layer.layer)
    except AttributeError as error:
        raise ValueError(f"the model has no layer {layer.layer}, which the table knows") from error
    if isinstance(module, nn.MultiheadAttention):
        return layer
    inputs, outputs = _widths(module)
    weight = module._parameters.get("values", module._parameters.get("weight"))
    smaller = replace(layer, inputs=inputs, outputs=outputs, groups=getattr(module, "groups", 1))
    assert weight is not None
    return replace(smaller, density=int(weight.count_nonzero()) / smaller.weights)


def _widths(module: Any) -> tuple[int, int]:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return module.in_channels, module.out_channels
