"""From one sparsity to a number of active weights for each layer.

Every allocation states how many active weights the layers should have *relative to each other*;
:func:`allocate` turns that into whole counts whose total is exact. The arithmetic is rational
(``fractions.Fraction``), so neither the dense clamp nor the rounding depends on float noise.
"""

import difflib
import math
from abc import ABC
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from fractions import Fraction
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter

from sparsetrain._apportion import apportion


class LayerShape(NamedTuple):
    """A layer to allocate to: its count will be a multiple of ``quantum``."""

    name: str
    shape: tuple[int, ...]
    quantum: int = 1
    built: int | None = None  # active weights of a layer that came sparse

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


class Allocation(BaseModel, ABC):
    """Base of the allocations."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def fixes_density(self) -> bool:
        """Whether the allocation gives the densities itself, so that no sparsity is asked for."""
        return False

    def weight(self, layer: LayerShape) -> Fraction:
        """Active weights of the layer relative to the other layers, before any clamp."""
        return Fraction(layer.numel)


class Uniform(Allocation):
    """The same density in every layer."""

    kind: Literal["uniform"] = "uniform"


class UniformFirstDense(Allocation):
    """The first layer dense, all others at the given sparsity (Evci et al. 2020, section 3)."""

    kind: Literal["uniform_first_dense"] = "uniform_first_dense"


class ErdosRenyi(Allocation):
    """Density ``eps * (fan_in + fan_out) / (fan_in * fan_out)`` (Mocanu et al. 2018, equation 1).

    Fans are the first two dimensions, so all positions of a convolution kernel share one density.
    Without ``epsilon`` it is solved for the sparsity asked for; with it no sparsity may be given.
    """

    kind: Literal["erdos_renyi"] = "erdos_renyi"
    epsilon: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Connections for each unit of the two layers joined, above 0; the SET paper "
        "uses 11 to 20. Null: solved from the sparsity.",
    )

    @property
    def fixes_density(self) -> bool:
        """True when ``epsilon`` is given."""
        return self.epsilon is not None

    def weight(self, layer: LayerShape) -> Fraction:
        """``(fan_out + fan_in) / (fan_out * fan_in)`` of the weights."""
        fan_out = layer.shape[0]
        fan_in = layer.shape[1] if len(layer.shape) > 1 else 1
        return Fraction((fan_out + fan_in) * layer.numel, fan_out * fan_in)


class ErdosRenyiKernel(Allocation):
    """Density proportional to ``sum(shape) / prod(shape)`` (Evci et al. 2020, section 3, ERK)."""

    kind: Literal["erdos_renyi_kernel"] = "erdos_renyi_kernel"

    def weight(self, layer: LayerShape) -> Fraction:
        """The sum of the dimensions."""
        return Fraction(sum(layer.shape))


class Global(Allocation):
    """Layers compete by score (:func:`sparsetrain.selection.top_k_across`).

    Without scores the counts are those a global random choice has on average, which is uniform.
    """

    kind: Literal["global"] = "global"


class Explicit(Allocation):
    """Densities written down, by glob over layer names; the first glob that matches wins."""

    kind: Literal["explicit"] = "explicit"
    densities: dict[str, Annotated[float, Field(gt=0, le=1)]] = Field(
        min_length=1, description="Glob over layer names -> share of active weights, in (0, 1]."
    )

    @property
    def fixes_density(self) -> bool:
        """Always True."""
        return True


class AsBuilt(Allocation):
    """The density a layer has: that of a `SparseLinear`, and 1 for a layer that is dense."""

    kind: Literal["as_built"] = "as_built"

    @property
    def fixes_density(self) -> bool:
        """Always True."""
        return True


AnyAllocation = Annotated[
    Uniform | UniformFirstDense | ErdosRenyi | ErdosRenyiKernel | Global | Explicit | AsBuilt,
    Field(discriminator="kind"),
]
_ADAPTER: TypeAdapter[
    Uniform | UniformFirstDense | ErdosRenyi | ErdosRenyiKernel | Global | Explicit | AsBuilt
] = TypeAdapter(AnyAllocation)
_KINDS = (
    "uniform",
    "uniform_first_dense",
    "erdos_renyi",
    "erdos_renyi_kernel",
    "global",
    "explicit",
    "as_built",
)
_ALIASES = {"erk": "erdos_renyi_kernel", "er": "erdos_renyi"}


def _normalise(value: object) -> object:
    """Names and aliases as the dict they stand for; instances and mappings otherwise unchanged."""
    if isinstance(value, Allocation):
        return value
    if isinstance(value, Mapping):
        kind = value.get("kind")
        if isinstance(kind, str):
            return {**value, "kind": _known_kind(kind)}
        return value
    if isinstance(value, str):
        return {"kind": _known_kind(value)}
    raise ValueError(f"{value!r} is not an allocation: give a name, a mapping or an instance")


def _known_kind(kind: str) -> str:
    known = _ALIASES.get(kind, kind)
    if known not in _KINDS:
        near = difflib.get_close_matches(kind, [*_KINDS, *_ALIASES], n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(_KINDS)}"
        raise ValueError(f"unknown allocation {kind!r}: {hint}")
    return known


AllocationField = Annotated[
    AnyAllocation, BeforeValidator(_normalise, json_schema_input_type=AnyAllocation | str)
]
"""Annotation for a pydantic field that takes an allocation, its name (``erk``) or a mapping."""


def parse_allocation(value: "Allocation | str | Mapping[str, Any]") -> Allocation:
    """An allocation from its name, a mapping with a ``kind``, or itself.

    Raises ValueError for an unknown name (with the nearest known one) or a bad field.
    """
    return _ADAPTER.validate_python(_normalise(value))


def active_total(numel: int, sparsity: float) -> int:
    """Active weights among ``numel`` at ``sparsity``, rounded to the nearest whole number."""
    return round((1.0 - sparsity) * numel)


def allocate(
    allocation: "Allocation | str | Mapping[str, Any]",
    layers: Sequence[LayerShape],
    sparsity: float | None,
    limits: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Number of active weights for each layer, in the order of ``layers``.

    The total is exactly ``round((1 - sparsity) * numel)``, or the closest reachable number below
    where quanta forbid it. Layers whose share exceeds their size (or their entry in ``limits``)
    are filled and the rest is shared again; every layer keeps at least one quantum. Fractions go
    to the largest remainders, ties to the earlier layer. ``uniform_first_dense`` is exact over the
    layers after the first.

    Raises ValueError for a sparsity outside [0, 1) or so high that a layer would be left without a
    weight, for a sparsity given to (or missing from) an allocation that does (or does not) fix
    densities itself, for globs without a layer and layers without a glob, and for layers that are
    empty, repeated or smaller than their quantum.
    """
    allocation = parse_allocation(allocation)
    _check_layers(layers)
    if allocation.fixes_density:
        if sparsity is not None:
            raise ValueError(
                f"allocation {_kind(allocation)!r} fixes the densities itself: leave sparsity out"
            )
        if isinstance(allocation, AsBuilt):
            return {n.name: n.numel if n.built is None else n.built for n in layers}
        return _fixed_counts(allocation, layers)
    if sparsity is None or not 0.0 <= sparsity < 1.0:
        raise ValueError(
            f"sparsity={sparsity}: allocation {_kind(allocation)!r} needs a sparsity in [0, 1)"
        )
    if isinstance(allocation, UniformFirstDense):
        first, *rest = layers
        if sparsity > 0 and not rest:
            raise ValueError(
                f"uniform_first_dense leaves the only layer {first.name!r} dense: use uniform"
            )
        dense = first.numel // first.quantum * first.quantum
        return {first.name: dense, **_shared(allocation, rest, sparsity, limits)}
    return _shared(allocation, layers, sparsity, limits)


def _shared(
    allocation: Allocation,
    layers: Sequence[LayerShape],
    sparsity: float,
    limits: Mapping[str, int] | None,
) -> dict[str, int]:
    numel = sum(layer.numel for layer in layers)
    total, least = active_total(numel, sparsity), sum(layer.quantum for layer in layers)
    if total < least:
        raise ValueError(
            f"sparsity={sparsity} keeps {total} of {numel} weights, which leaves layers such as "
            f"{layers[0].name!r} empty: {len(layers)} layers need at least {least}, a sparsity of "
            f"at most {1 - least / numel:.6g}"
        )
    counts = apportion(
        [allocation.weight(layer) for layer in layers],
        [layer.numel if limits is None else limits[layer.name] for layer in layers],
        [layer.quantum for layer in layers],
        total,
    )
    return {layer.name: count for layer, count in zip(layers, counts, strict=True)}


def _fixed_counts(allocation: Allocation, layers: Sequence[LayerShape]) -> dict[str, int]:
    if isinstance(allocation, Explicit):
        wanted = _explicit_counts(allocation.densities, layers)
    else:
        assert isinstance(allocation, ErdosRenyi) and allocation.epsilon is not None
        epsilon = Fraction(allocation.epsilon)
        wanted = [epsilon * allocation.weight(layer) for layer in layers]
    counts = {}
    for layer, count in zip(layers, wanted, strict=True):
        units = max(1, round(count / layer.quantum))
        counts[layer.name] = min(units, layer.numel // layer.quantum) * layer.quantum
    return counts


def _explicit_counts(
    densities: Mapping[str, float], layers: Sequence[LayerShape]
) -> list[Fraction]:
    names = [layer.name for layer in layers]
    for glob in densities:
        if not any(fnmatchcase(name, glob) for name in names):
            near = difflib.get_close_matches(glob, names, n=3, cutoff=0.3) or names[:3]
            raise ValueError(
                f"explicit allocation: {glob!r} matches no layer; nearest names: {', '.join(near)}"
            )
    counts = []
    for layer in layers:
        matches = (share for glob, share in densities.items() if fnmatchcase(layer.name, glob))
        density = next(matches, None)
        if density is None:
            raise ValueError(
                f"explicit allocation: no density for layer {layer.name!r}; add it, or a last "
                "entry '*'"
            )
        counts.append(Fraction(density) * layer.numel)
    return counts


def _check_layers(layers: Sequence[LayerShape]) -> None:
    if not layers:
        raise ValueError("there are no layers to allocate active weights to")
    seen: set[str] = set()
    for layer in layers:
        if layer.name in seen:
            raise ValueError(f"layer {layer.name!r} is given twice")
        seen.add(layer.name)
        if layer.numel == 0:
            raise ValueError(f"layer {layer.name!r} has no weights (shape {layer.shape})")
        if not 1 <= layer.quantum <= layer.numel:
            raise ValueError(
                f"layer {layer.name!r}: quantum {layer.quantum} must lie between 1 and its "
                f"{layer.numel} weights"
            )


def _kind(allocation: Allocation) -> str:
    return str(getattr(allocation, "kind", type(allocation).__name__))
