"""What is added to a layer's output: the other side of a residual block's sum."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparsetrain.scores.batch_norm_scale import norms_after

#: (layer, what its output is added to).
SeeAddend = Callable[[nn.Module, Tensor], None]

_LEAST = 1e-3  # of the largest scale

_SUMS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__, Tensor.__radd__}


@contextmanager
def addends(model: nn.Module, layers: Sequence[nn.Module], see: SeeAddend) -> Iterator[None]:
    """Show what the outputs of layers are added to, as they are or after a batch normalisation."""
    made: dict[int, tuple[nn.Module, Tensor]] = {}  # the tensor is kept, so that no id comes twice

    def remember(layer: nn.Module, module: nn.Module, args: Any, output: Tensor) -> None:
        made[id(output)] = (layer, output)

    after = norms_after(model)
    sources = [(layer, layer) for layer in layers]
    sources += [(layer, after[id(layer)]) for layer in layers if id(layer) in after]
    handles = [source.register_forward_hook(partial(remember, layer)) for layer, source in sources]
    handles.append(model.register_forward_hook(lambda *_: made.clear()))
    try:
        with _Sums(made, see):
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Sums(TorchFunctionMode):
    """Looks at every sum of two tensors of one shape."""

    def __init__(self, made: dict[int, tuple[nn.Module, Tensor]], see: SeeAddend) -> None:
        super().__init__()
        self.made, self.see = made, see

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _SUMS and len(args) == 2 and all(isinstance(a, Tensor) for a in args):
            for mine, other in (args, args[::-1]):
                if id(mine) in self.made and mine.shape == other.shape:
                    self.see(self.made[id(mine)][0], other.detach())
        return func(*args, **(kwargs or {}))


def inverse_scale(model: nn.Module, layer: nn.Module) -> Tensor:
    """[outputs]: what turns numbers behind the batch normalisation after a layer into the layer's.

    1 without one, and 0 where the normalisation lets next to nothing through.
    """
    norm, weight = norms_after(model).get(id(layer)), cast(Tensor, layer.weight).detach()
    if norm is None:
        return weight.new_ones(len(weight))
    assert norm.running_var is not None
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight.detach()
    return torch.where(scale.abs() > _LEAST * scale.abs().max(), 1 / scale, 0.0)
