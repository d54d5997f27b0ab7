"""What a layer has of a channel: which slices of which tensors, and which attributes count them.

One row a kind of layer in `_KINDS`. A new kind of layer needs a row there and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from sparsetrain.convolution import CONVOLUTIONS, TRANSPOSED

#: Whether channels come out of a layer, go in, or pass through one by one.
Role = Literal["out", "in", "through"]


@dataclass(frozen=True)
class Side:
    """A layer at which the channels of a coupling come out, go in, or pass through.

    Attributes:
        layer: name of the module.
        places: for each channel of the coupling, its positions among those of the layer. More than
            one where a Linear layer follows a flattening, and where groups go together.
    """

    layer: str
    module: Any
    role: Role
    places: tuple[tuple[int, ...], ...]

    @property
    def width(self) -> int:
        """Positions in all."""
        return sum(len(positions) for positions in self.places)

    @property
    def size(self) -> int:
        """Positions that the layer has, those of other couplings among them; 0 if in no tensor."""
        return next((getattr(self.module, leaf).shape[dim] for leaf, dim in self.slices()), 0)

    def slices(self) -> list[tuple[str, int]]:
        """(leaf, dimension) of each tensor of the module that has the channels along it."""
        return _kind(self.module).slices(self.module, self.role)

    def positions(self, channels: Sequence[int]) -> list[int]:
        """Where channels are along a tensor's dimension, ascending."""
        found = {place for channel in channels for place in self.places[channel]}
        if self.role == "in" and is_grouped(self.module):
            # The weight holds the inputs of one group, and every group loses the same.
            size = self.module.weight.shape[1]
            found = {place % size for place in found}
        return sorted(found)


@dataclass(frozen=True)
class _Kind:
    slices: Callable[[Any, Role], list[tuple[str, int]]]
    #: Attributes that count channels, as the tensors have them.
    counts: Callable[[Any], dict[str, Any]]


def is_depthwise(module: Any) -> bool:
    """Whether each channel that comes out is made of the one that goes in at its place."""
    if not isinstance(module, CONVOLUTIONS):
        return False
    return 1 < module.groups == module.in_channels == module.out_channels


def is_grouped(module: Any) -> bool:
    """Whether a convolution has groups that are more than one channel."""
    is_convolution = isinstance(module, (*CONVOLUTIONS, *TRANSPOSED))
    return is_convolution and module.groups > 1 and not is_depthwise(module)


def is_known(module: nn.Module) -> bool:
    """Whether the layer is of a kind that has channels."""
    return isinstance(module, tuple(_KINDS))


def can_lose_channels(module: Any) -> bool:
    """Whether channels can be taken out of the layer."""
    if isinstance(module, TRANSPOSED):
        return module.groups == 1
    if isinstance(module, nn.LayerNorm):  # else its size is in no tensor, or channels are not last
        return module.weight is not None and module.weight.dim() == 1
    return is_known(module) and not (isinstance(module, nn.GroupNorm) and not module.affine)


def require_plain(sides: Sequence[Side], who: str) -> None:
    """Raise ValueError unless inputs of these layers can be told apart in their weights."""
    for side in sides:
        if is_grouped(side.module) or isinstance(side.module, TRANSPOSED):
            raise ValueError(
                f"{who} takes the next layer apart, which cannot be done for {side.layer}: it has "
                "groups or is transposed; leave the channels before it out by a rule"
            )


def role_of(module: nn.Module, is_out: bool) -> Role:
    """The role of a layer for channels on one side of it."""
    is_product = isinstance(module, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED))
    if is_depthwise(module) or not is_product:
        return "through"
    return "out" if is_out else "in"


def counts(module: nn.Module) -> dict[str, Any]:
    """Attribute -> value, of those that say how many channels the layer's tensors have."""
    return _kind(module).counts(module) if is_known(module) else {}


def _kind(module: nn.Module) -> _Kind:
    return next(row for kind, row in _KINDS.items() if isinstance(module, kind))


def _present(module: nn.Module, *slices: tuple[str, int]) -> list[tuple[str, int]]:
    return [(leaf, dim) for leaf, dim in slices if isinstance(getattr(module, leaf, None), Tensor)]


# Linear layers, convolutions and embeddings


def _product_slices(module: Any, role: Role) -> list[tuple[str, int]]:
    return _present(module, ("weight", 1)) if role == "in" else _vectors(module, role)


def _convolution_counts(module: Any) -> dict[str, Any]:
    outputs, inputs = module.weight.shape[:2]
    groups = outputs if is_depthwise(module) else module.groups
    return {"out_channels": outputs, "in_channels": inputs * groups, "groups": groups}


def _transposed_slices(module: Any, role: Role) -> list[tuple[str, int]]:
    return _present(module, *([("weight", 0)] if role == "in" else [("weight", 1), ("bias", 0)]))


def _transposed_counts(module: Any) -> dict[str, Any]:
    return {"out_channels": module.weight.shape[1], "in_channels": module.weight.shape[0]}


def _linear_counts(module: Any) -> dict[str, Any]:
    return {"out_features": module.weight.shape[0], "in_features": module.weight.shape[1]}


def _embedding_slices(module: Any, role: Role) -> list[tuple[str, int]]:
    return [("weight", 1)]


# Norms and other layers that treat each channel by itself


def _vectors(module: Any, role: Role) -> list[tuple[str, int]]:
    leaves = ("weight", "bias", "running_mean", "running_var")
    return _present(module, *((leaf, 0) for leaf in leaves))


def _length(module: Any) -> int:
    return len(getattr(module, _vectors(module, "through")[0][0]))


def _batch_norm_counts(module: Any) -> dict[str, Any]:
    return {"num_features": _length(module)} if _vectors(module, "through") else {}


def _layer_norm_counts(module: Any) -> dict[str, Any]:
    return {"normalized_shape": tuple(module.weight.shape)} if module.weight is not None else {}


def _group_norm_counts(module: Any) -> dict[str, Any]:
    return {"num_channels": _length(module)} if module.affine else {}


def _prelu_slices(module: Any, role: Role) -> list[tuple[str, int]]:
    return [] if len(module.weight) == 1 else [("weight", 0)]


_KINDS: dict[type[nn.Module], _Kind] = {
    nn.Linear: _Kind(_product_slices, _linear_counts),
    **dict.fromkeys(CONVOLUTIONS, _Kind(_product_slices, _convolution_counts)),
    **dict.fromkeys(TRANSPOSED, _Kind(_transposed_slices, _transposed_counts)),
    nn.Embedding: _Kind(_embedding_slices, lambda m: {"embedding_dim": m.weight.shape[1]}),
    nn.BatchNorm1d: _Kind(_vectors, _batch_norm_counts),
    nn.BatchNorm2d: _Kind(_vectors, _batch_norm_counts),
    nn.BatchNorm3d: _Kind(_vectors, _batch_norm_counts),
    nn.LayerNorm: _Kind(_vectors, _layer_norm_counts),
    nn.GroupNorm: _Kind(_vectors, _group_norm_counts),
    nn.PReLU: _Kind(_prelu_slices, lambda m: {"num_parameters": len(m.weight)}),
}
