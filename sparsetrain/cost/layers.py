"""Which layers run in a forward pass, and how large they are there.

What a network costs is a function of this list. So is what it would cost with fewer channels or
weights, for which the list is changed and no network is built.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from sparsetrain.batches import called
from sparsetrain.candidates import find_candidates, plain_name
from sparsetrain.convolution import CONVOLUTIONS, TRANSPOSED
from sparsetrain.evaluating import evaluation_mode, ordinary_attention
from sparsetrain.storage.csr.layers import SparseConv2d, SparseLayer

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class LayerUse:
    """One use of a weight in the forward pass of one sample.

    Attributes:
        name: of the weight.
        layer: name of the module.
        kind: of the product.
        inputs: channels or features that go in.
        outputs: channels or features that come out.
        kernel: size of a convolution's kernel; () for a linear layer, as the next five.
        stride: of a convolution.
        padding: of a convolution, on each side.
        dilation: of a convolution.
        in_size: height and width of what goes into a convolution.
        out_size: the same of what comes out.
        groups: of a convolution; 1 for a linear layer.
        repeats: how often the layer runs for a sample, such as once a token.
        density: share of the weight that is not 0.
        has_bias: whether a bias is added.
    """

    name: str
    layer: str
    kind: Literal["linear", "convolution", "transposed"]
    inputs: int
    outputs: int
    kernel: Sizes = ()
    stride: Sizes = ()
    padding: Sizes = ()
    dilation: Sizes = ()
    in_size: Sizes = ()
    out_size: Sizes = ()
    groups: int = 1
    repeats: float = 1.0
    density: float = 1.0
    has_bias: bool = True

    @property
    def weights(self) -> int:
        """Numbers in the weight, zeros included."""
        return self.inputs * self.outputs // self.groups * math.prod(self.kernel)

    @property
    def macs(self) -> float:
        """Multiply-adds if no weight were 0."""
        positions = self.in_size if self.kind == "transposed" else self.out_size
        return self.weights * math.prod(positions) * self.repeats

    @property
    def flops(self) -> float:
        """FLOPs of the non-zeros; a multiply-add counts 2."""
        return 2 * self.macs * self.density

    @property
    def input_numbers(self) -> float:
        """Numbers that go in."""
        return self.inputs * math.prod(self.in_size) * self.repeats

    @property
    def output_numbers(self) -> float:
        """Numbers that come out."""
        return self.outputs * math.prod(self.out_size) * self.repeats


@torch.no_grad()
def layers_used(model: nn.Module, example_inputs: Any) -> list[LayerUse]:
    """Every use of a Linear, Conv or attention weight, in the order in which they run.

    Args:
        example_inputs: a batch, [N, ...], or a tuple of positional or a mapping of keyword
            arguments, the first tensor of which is one.

    Raises:
        ValueError: the model uses no such layer on these inputs.
    """
    samples = len(next(leaf for leaf in tree_leaves(example_inputs) if isinstance(leaf, Tensor)))
    names = {id(c.param): plain_name(c.name) for c in find_candidates(model)}
    used: list[LayerUse] = []

    def note(weight: Tensor | None, layer: str, count: float, **sizes: Any) -> None:
        if weight is not None and id(weight) in names:
            name = names[id(weight)]
            density = densities[name]
            used.append(LayerUse(name, layer, repeats=count / samples, density=density, **sizes))

    densities = _Densities(model)
    with _hooked(model, note), evaluation_mode(model), ordinary_attention():
        called(model, example_inputs)
    if not used:
        raise ValueError("no Linear, Conv or attention layer ran on the example inputs")
    return used


class _Densities(dict[str, float]):
    """Name of a weight -> share of non-zeros, counted when first asked for."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.candidates = {plain_name(c.name): c for c in find_candidates(model)}

    def __missing__(self, name: str) -> float:
        owner, leaf = self.candidates[name].owners[0], name.rpartition(".")[2]
        if isinstance(owner, SparseLayer):
            self[name] = owner.values.numel() / math.prod(owner.weight_shape)
        else:
            weight = _as_used(owner, leaf)
            unknown = weight.is_meta or not weight.numel()
            self[name] = 1.0 if unknown else int(weight.count_nonzero()) / weight.numel()
        return self[name]


def _as_used(owner: nn.Module, leaf: str) -> Tensor:
    """A weight as the forward pass sees it, also where a parametrization makes it."""
    weight: Tensor = (
        owner() if isinstance(owner, parametrize.ParametrizationList) else getattr(owner, leaf)
    )
    return weight


_Note = Callable[..., None]


@contextmanager
def _hooked(model: nn.Module, note: _Note) -> Iterator[None]:
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            hook = _hook(module, name, note)
            if hook is not None:
                hooks.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield


def _hook(module: nn.Module, name: str, note: _Note) -> Any:
    if isinstance(module, nn.MultiheadAttention):
        return lambda m, args, kwargs, out: _note_attention(m, name, args, kwargs, note)
    if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED, SparseConv2d)):
        return lambda m, args, kwargs, out: _note_convolution(
            m, name, _first(args, kwargs), out, note
        )
    if isinstance(module, nn.Linear | SparseLayer):
        return lambda m, args, kwargs, out: note(
            _held(m),
            name,
            out.numel() / m.out_features,
            kind="linear",
            inputs=m.in_features,
            outputs=m.out_features,
            has_bias=m.bias is not None,
        )
    return None


def _held(module: nn.Module, leaf: str = "weight") -> Tensor:
    """The parameter that a layer holds, also behind a learned mask."""
    if isinstance(module, SparseLayer):
        return module.values
    if parametrize.is_parametrized(module, leaf):
        lists: Any = module.parametrizations
        if hasattr(lists[leaf], "original"):  # a weight made of several parts has other names
            module, leaf = lists[leaf], "original"
    held: Tensor = getattr(module, leaf)
    return held


def _note_convolution(module: Any, name: str, x: Tensor, out: Tensor, note: _Note) -> None:
    dims = len(module.kernel_size)
    padding = module.padding
    if isinstance(padding, str):  # the same number of positions as before, or none
        spans = zip(module.kernel_size, module.dilation, strict=True)
        same = tuple(dilation * (size - 1) // 2 for size, dilation in spans)
        padding = same if padding == "same" else (0,) * dims
    note(
        _held(module),
        name,
        out.numel() / (module.out_channels * math.prod(out.shape[-dims:])),
        kind="transposed" if isinstance(module, TRANSPOSED) else "convolution",
        inputs=module.in_channels,
        outputs=module.out_channels,
        kernel=tuple(module.kernel_size),
        stride=tuple(module.stride),
        padding=tuple(padding),
        dilation=tuple(module.dilation),
        in_size=tuple(x.shape[-dims:]),
        out_size=tuple(out.shape[-dims:]),
        groups=module.groups,
        has_bias=module.bias is not None,
    )


def _note_attention(module: Any, name: str, args: Any, kwargs: Any, note: _Note) -> None:
    given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
    width, prefix = module.embed_dim, f"{name}." if name else ""
    for key in ("query", "key", "value"):
        tokens = given[key].numel() // given[key].shape[-1]
        leaf = "in_proj_weight" if module._qkv_same_embed_dim else f"{key[0]}_proj_weight"
        sizes = {"inputs": given[key].shape[-1], "outputs": width, "kind": "linear"}
        has_bias = module.in_proj_bias is not None
        note(_held(module, leaf), name, tokens, has_bias=has_bias, **sizes)
    # The output projection is applied without calling its module.
    tokens = given["query"].numel() // given["query"].shape[-1]
    sizes = {"inputs": width, "outputs": width, "kind": "linear"}
    has_bias = module.out_proj.bias is not None
    note(_held(module.out_proj), f"{prefix}out_proj", tokens, has_bias=has_bias, **sizes)


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    value: Tensor = args[0] if args else kwargs["input"]
    return value
