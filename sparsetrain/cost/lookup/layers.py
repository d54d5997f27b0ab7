"""How long single layers take: their shapes, the cases that are measured, and the measuring."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from sparsetrain.cost.layers import LayerUse
from sparsetrain.random_choice import random_ranks
from sparsetrain.storage.csr.convert import sparsify
from sparsetrain.timing import Clock, Job, median_seconds

Storage = Literal["dense", "csr"]

#: Points of an axis at most; wider layers have them further and further apart.
_POINTS = 12
_SECONDS = 0.001  # of a round, at least
_CONVOLUTIONS: dict[tuple[str, int], Any] = {
    ("convolution", 1): nn.Conv1d,
    ("convolution", 2): nn.Conv2d,
    ("convolution", 3): nn.Conv3d,
    ("transposed", 1): nn.ConvTranspose1d,
    ("transposed", 2): nn.ConvTranspose2d,
    ("transposed", 3): nn.ConvTranspose3d,
}


@dataclass(frozen=True)
class Shape:
    """Layers that take equally long.

    Attributes:
        use: at full width, without names, dense.
        channels_last: whether a convolution computes in that memory format.
        csr: whether csr storage can hold the weight.
        follows: whether a linear layer takes the layout of a sparse one before it.
    """

    use: LayerUse
    channels_last: bool = False
    csr: bool = False
    follows: bool = False


class Case(NamedTuple):
    """What is measured of a shape.

    Attributes:
        storage: of the weight.
        after_csr: whether the input has the layout that a sparse layer gives.
        inputs: channels.
        outputs: channels.
        sparsity: of a csr weight; 0 for a dense one.
    """

    storage: Storage
    after_csr: bool
    inputs: int
    outputs: int
    sparsity: float = 0.0


@dataclass(frozen=True)
class Setting:
    """What all layers have in common.

    Attributes:
        samples: of a batch.
        dtype: of weights and inputs, such as "float32".
        device: such as "cpu" or "cuda:0".
    """

    samples: int
    dtype: str
    device: str

    @property
    def options(self) -> dict[str, Any]:
        """For functions that make tensors."""
        return {"dtype": getattr(torch, self.dtype), "device": self.device}


def is_depthwise(use: LayerUse) -> bool:
    """Whether a convolution's groups have one input each, so that one number gives its width."""
    return 1 < use.groups == use.inputs


def axis(full: int, step: int, *, of: int = 1) -> list[int]:
    """Numbers of channels to measure: multiples of `step` and `of`, and the full number.

    With more than twelve the distances grow geometrically.
    """
    step = math.lcm(step, of)
    points = {*range(step, full, step), full}
    if len(points) > _POINTS:
        growth = (full / step) ** (1 / (_POINTS - 1))
        points = {step * round(growth**k) for k in range(_POINTS - 1)} | {full}
    return sorted(points)


def cases(
    shape: Shape, step: int, sparsities: Sequence[float], storages: Sequence[Storage]
) -> list[Case]:
    """Everything to measure of a shape."""
    use = shape.use
    if is_depthwise(use):
        multiplier = use.outputs // use.groups
        widths = [(count, multiplier * count) for count in axis(use.inputs, step)]
    else:
        sides = (axis(n, step, of=use.groups) for n in (use.inputs, use.outputs))
        inputs, outputs = sides
        widths = [(n, m) for n in inputs for m in outputs]
    found = [Case("dense", False, *width) for width in widths]
    if shape.csr and "csr" in storages:
        layouts = (False, True) if shape.follows else (False,)
        full = (use.inputs, use.outputs)
        found += [Case("csr", after, *full, s) for after in layouts for s in sparsities]
        if shape.follows:
            found.append(Case("dense", True, *full))
    return found


class LayerJob:
    """A forward pass of one layer."""

    def __init__(self, shape: Shape, case: Case, setting: Setting, numbers: Tensor) -> None:
        self.shape, self.case = shape, case
        self.module = _module(shape, case, setting)
        self.x = _input(shape, case, setting, numbers)

    @torch.no_grad()
    def __call__(self) -> None:
        """Run it."""
        self.module(self.x)


def layer_seconds(
    shape: Shape,
    wanted: Sequence[Case],
    reference: Job,
    setting: Setting,
    clock: Clock,
    rounds: int,
) -> tuple[float, tuple[float, ...]]:
    """Seconds of a reference and of each case, measured in turn."""
    largest = max(math.prod(_input_sizes(shape.use, case, setting)) for case in wanted)
    numbers = torch.randn(largest, **setting.options)
    jobs = [LayerJob(shape, case, setting, numbers) for case in wanted]
    times = median_seconds([reference, *jobs], clock, rounds=rounds, seconds=_SECONDS)
    return times[0], tuple(times[1:])


def _module(shape: Shape, case: Case, setting: Setting) -> nn.Module:
    use = shape.use
    options: dict[str, Any] = {"bias": use.has_bias, **setting.options}
    layer: nn.Module
    if use.kind == "linear":
        layer = nn.Linear(case.inputs, case.outputs, **options)
    else:
        groups = case.inputs if is_depthwise(use) else use.groups
        options |= {"dilation": use.dilation, "groups": groups}
        if use.kind == "transposed":
            options["output_padding"] = _output_padding(use)
        kind = _CONVOLUTIONS[use.kind, len(use.kernel)]
        layer = kind(case.inputs, case.outputs, use.kernel, use.stride, use.padding, **options)
    if case.storage == "csr":
        weight: Any = layer.weight
        sparsify(layer, random_mask(weight.shape, case.sparsity))
    elif shape.channels_last:
        layer = layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return layer.eval().requires_grad_(False)


def random_mask(shape: Sequence[int], sparsity: float) -> Tensor:
    """Bool, with exactly that share of zeros, rounded, but one place that is kept at least."""
    mask = torch.zeros(math.prod(shape), dtype=torch.bool)
    kept = max(1, round((1 - sparsity) * len(mask)))
    mask[random_ranks(len(mask), kept, None)] = True
    return mask.view(*shape)


def _output_padding(use: LayerUse) -> tuple[int, ...]:
    """What was added to the size that the other numbers give."""
    sizes = zip(
        use.in_size, use.out_size, use.kernel, use.stride, use.padding, use.dilation, strict=True
    )
    return tuple(out - ((n - 1) * s - 2 * p + d * (k - 1) + 1) for n, out, k, s, p, d in sizes)


def _input_sizes(use: LayerUse, case: Case, setting: Setting) -> tuple[int, ...]:
    return (round(use.repeats * setting.samples), case.inputs, *use.in_size)


def _input(shape: Shape, case: Case, setting: Setting, numbers: Tensor) -> Tensor:
    """A view of `numbers`: all inputs share memory, so that wide layers need little of it."""
    sizes = _input_sizes(shape.use, case, setting)
    flat = numbers[: math.prod(sizes)]
    if case.after_csr or shape.channels_last:
        order = (sizes[1], sizes[0]) if len(sizes) == 2 else (sizes[0], *sizes[2:], sizes[1])
        return flat.view(order).movedim(0 if len(sizes) == 2 else -1, 1)
    return flat.view(sizes)


def anonymous(use: LayerUse) -> LayerUse:
    """Without what equal layers differ in."""
    return replace(use, name="", layer="", density=1.0)
