"""What layers give in a forward pass, which may end when enough was seen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from sparsetrain.batches import Batch


class _Enough(Exception):
    """Ends a forward pass whose rest nobody looks at."""


def up_to(
    model: nn.Module, batch: Batch, layers: Iterable[str], enough: Sequence[str]
) -> tuple[dict[str, Tensor], Any]:
    """What these layers gave, and the model's output, or None when these were enough."""
    with outputs_of(model, layers, enough) as found:
        try:
            return found, batch.forward(model)
        except _Enough:
            return found, None


@contextmanager
def outputs_of(
    model: nn.Module, layers: Iterable[str], enough: Sequence[str] = ()
) -> Iterator[dict[str, Tensor]]:
    """Name -> what these layers gave when they were called last.

    Args:
        enough: layers after all of which the pass ends by `_Enough`.
    """
    found: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        found[name] = output
        if enough and all(layer in found for layer in enough):
            raise _Enough

    handles = [
        model.get_submodule(name).register_forward_hook(partial(keep, name)) for name in {*layers}
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
