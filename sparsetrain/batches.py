"""Batches of any iterable, as arguments of a model and targets of a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsetrain.report.progress import tracked

#: Takes what an iterable yields; gives (inputs, targets).
Adapter = Callable[[Any], tuple[Any, Any]]


@dataclass(frozen=True)
class Batch:
    """One batch on the model's device.

    Attributes:
        args: positional arguments of the model.
        kwargs: keyword arguments of the model.
        targets: second argument of the loss; None when the batch has none.
        size: number of samples, the length of dimension 0 of every tensor.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: Any
    size: int

    def forward(self, model: Callable[..., Any]) -> Any:
        """The model's output."""
        return model(*self.args, **self.kwargs)

    def part(self, start: int, stop: int) -> Batch:
        """Samples `start` to `stop`."""

        def cut(leaf: Any) -> Any:
            return leaf[start:stop] if isinstance(leaf, Tensor) else leaf

        args, kwargs, targets = pytree.tree_map(cut, (self.args, self.kwargs, self.targets))
        return Batch(args, kwargs, targets, min(stop, self.size) - start)

    def parts(self, size: int) -> Iterator[Batch]:
        """The batch in pieces of `size` samples; the last may be smaller."""
        for start in range(0, self.size, size):
            yield self.part(start, start + size)


def called(model: Callable[..., Any], inputs: Any) -> Any:
    """The model's output.

    Args:
        inputs: a tensor, a tuple or list of positional or a mapping of keyword arguments.
    """
    args, kwargs = _arguments(inputs)
    return model(*args, **kwargs)


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return tuple(inputs) if isinstance(inputs, list | tuple) else (inputs,), {}


def read(
    batches: Iterable[Any],
    model: nn.Module,
    *,
    who: str,
    adapter: Adapter | None = None,
    needs_targets: bool = True,
    progress: bool = False,
) -> Iterator[Batch]:
    """Every batch, moved to where the model is.

    Args:
        batches: an iterable such as a DataLoader or a list. Each item is (inputs, targets), or
            whatever `adapter` makes that of. Inputs are a tensor, a tuple of positional
            arguments or a mapping of keyword arguments.
        who: what needs the batches, for errors.
        needs_targets: otherwise an item may be a tensor of inputs alone.
        progress: whether to show a bar.

    Raises:
        ValueError: there is no batch, or an item cannot be understood.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    found = 0
    for item in tracked(batches, who, progress=progress):
        found += 1
        inputs, targets = adapter(item) if adapter else _understood(item, who, needs_targets)
        yield _batch(inputs, targets, device, who)
    if not found:
        raise ValueError(
            f"{who} got no batch: the iterable is empty, or an iterator that was used up before "
            "(give a list or a DataLoader)"
        )


def _understood(item: Any, who: str, needs_targets: bool) -> tuple[Any, Any]:
    if isinstance(item, list | tuple) and len(item) == 2:
        return item[0], item[1]
    if not needs_targets and isinstance(item, Tensor):
        return item, None
    if isinstance(item, Mapping):
        raise ValueError(
            f"{who} got a batch that is a mapping of {', '.join(map(str, item))}: give an adapter, "
            "a function of such a batch that returns (inputs, targets); inputs may be a mapping "
            "of keyword arguments"
        )
    expected = "(inputs, targets)" if needs_targets else "(inputs, targets) or a tensor of inputs"
    raise ValueError(f"{who} expects batches of {expected}, not {_kind(item)}; or give an adapter")


def _kind(item: Any) -> str:
    if isinstance(item, list | tuple):
        return f"a {type(item).__name__} of {len(item)}"
    return type(item).__name__


def _batch(inputs: Any, targets: Any, device: torch.device, who: str) -> Batch:
    def moved(leaf: Any) -> Any:
        return leaf.to(device) if isinstance(leaf, Tensor) else leaf

    if isinstance(inputs, Mapping):
        inputs = dict(inputs)  # a tokeniser's own kind of mapping, too
    inputs, targets = pytree.tree_map(moved, (inputs, targets))
    args, kwargs = _arguments(inputs)
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    sizes = {len(tensor) if tensor.dim() else 0 for tensor in tensors}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            f"{who} needs inputs that have their samples along dimension 0, all as many; the "
            f"batch has {', '.join(str(tuple(t.shape)) for t in tensors) or 'no tensor'}"
        )
    return Batch(args, kwargs, targets, sizes.pop())
