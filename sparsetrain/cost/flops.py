"""Floating-point operations, counted as the appendix of RigL does (Evci et al. 2020, App. H).

A layer's forward pass costs its dense FLOPs times its density; the backward pass costs twice that
(one product for the input gradient, one for the weight gradient). Only products with weights are
counted; biases, norms and activations are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from sparsetrain.batches import called
from sparsetrain.candidates import find_candidates, plain_name
from sparsetrain.convolution import CONVOLUTIONS, TRANSPOSED
from sparsetrain.storage.csr.layers import SparseLayer

if TYPE_CHECKING:
    from sparsetrain.optimizer import SparseOptimizer


@dataclass(frozen=True)
class FlopsReport:
    """Dense FLOPs of one sample's forward pass (a multiply-add counts 2)."""

    layers: dict[str, float]

    @property
    def total(self) -> float:
        """Over all layers."""
        return sum(self.layers.values())


@dataclass(frozen=True)
class TrainingFlops:
    """FLOPs of the training so far, and of the network as it is now.

    Attributes:
        dense_inference: FLOPs of one sample's forward pass if every weight were active.
        inference_multiple: the sparse forward pass as a multiple of that.
        training_multiple: training so far as a multiple of dense training for as many steps.
    """

    dense_inference: float
    inference_multiple: float
    training_multiple: float


@torch.no_grad()
def flops(model: nn.Module, example_inputs: Any) -> FlopsReport:
    """Count the dense forward FLOPs of each weight, per sample.

    Args:
        example_inputs: a batch, [N, ...], or a tuple of positional or a mapping of keyword
            arguments, the first tensor of which is one.

    Returns:
        FLOPs by parameter name; a weight used several times counts each use.

    Raises:
        ValueError: the model uses no Linear, Conv or attention layer on these inputs.
    """
    samples = len(next(leaf for leaf in tree_leaves(example_inputs) if isinstance(leaf, Tensor)))
    names = {id(c.param): plain_name(c.name) for c in find_candidates(model)}
    counts: dict[str, float] = {}

    def add(weight: Tensor | None, amount: float) -> None:
        if weight is not None and id(weight) in names:
            name = names[id(weight)]
            counts[name] = counts.get(name, 0.0) + amount / samples

    with _hooked(model, add), _evaluation_mode(model):
        called(model, example_inputs)
    if not counts:
        raise ValueError("no Linear, Conv or attention layer ran on the example inputs")
    return FlopsReport({name: counts[name] for name in names.values() if name in counts})


def training_flops(optimizer: SparseOptimizer, model: nn.Module, inputs: Any) -> TrainingFlops:
    """FLOPs of the training that `optimizer` has done, relative to dense training.

    Per step a layer of density d and dense forward FLOPs f costs f d forward and 2 f d backward.
    Where a policy reads the dense gradient (RigL at updates, SNFS, surgery and SR-STE always) the
    weight-gradient half of the backward pass costs f.

    Args:
        model: the model that the optimizer trains.
        inputs: as for `flops`.
    """
    report = flops(model, inputs)
    now, done = 0.0, 0.0
    for name, dense in report.layers.items():
        density, mean, idle_with_gradient = optimizer.density_history(name)
        now += dense * density
        done += dense * (3 * mean + idle_with_gradient)
    return TrainingFlops(
        dense_inference=report.total,
        inference_multiple=now / report.total,
        training_multiple=done / (3 * report.total),
    )


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def _hooked(model: nn.Module, add: Any) -> Iterator[None]:
    handles = []
    seen: set[int] = set()
    for module in model.modules():
        if id(module) in seen:
            continue
        seen.add(id(module))
        hook = _counter(module, add)
        if hook is not None:
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _counter(module: nn.Module, add: Any) -> Any:
    if isinstance(module, nn.MultiheadAttention):
        return lambda m, args, kwargs, out: _count_attention(m, args, kwargs, add)
    if isinstance(module, SparseLayer):
        # Each output element is a product with one row.
        return lambda m, args, kwargs, out: add(m.values, 2.0 * out.numel() * m.pattern.shape[1])
    if isinstance(module, nn.Linear):
        return lambda m, args, kwargs, out: add(_held(m), 2.0 * out.numel() * m.in_features)
    if isinstance(module, CONVOLUTIONS):
        # Each output element is a product with one filter.
        return lambda m, args, kwargs, out: add(_held(m), 2.0 * out.numel() * _held(m)[0].numel())
    if isinstance(module, TRANSPOSED):
        # Each input element is a product with one filter.
        return lambda m, args, kwargs, out: add(
            _held(m), 2.0 * _first(args, kwargs).numel() * _held(m)[0].numel()
        )
    return None


def _held(module: nn.Module, leaf: str = "weight") -> Tensor:
    """The parameter that a layer holds, also behind a learned mask."""
    if parametrize.is_parametrized(module, leaf):
        lists: Any = module.parametrizations
        if hasattr(lists[leaf], "original"):  # a weight made of several parts has other names
            module, leaf = lists[leaf], "original"
    held: Tensor = getattr(module, leaf)
    return held


def _count_attention(
    module: nn.MultiheadAttention, args: Iterable[Any], kwargs: dict[str, Any], add: Any
) -> None:
    given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
    tokens = {k: given[k].numel() // given[k].shape[-1] for k in ("query", "key", "value")}
    if module._qkv_same_embed_dim:
        width = module.embed_dim
        add(_held(module, "in_proj_weight"), 2.0 * width * width * sum(tokens.values()))
    else:
        for key in ("query", "key", "value"):
            weight = _held(module, f"{key[0]}_proj_weight")
            add(weight, 2.0 * weight.numel() * tokens[key])
    # The output projection is applied without calling its module.
    weight = _held(module.out_proj)
    add(weight, 2.0 * weight.numel() * tokens["query"])


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    value: Tensor = args[0] if args else kwargs["input"]
    return value
