"""st.channels.prune: fewer channels, for good."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from sparsetrain.batches import Adapter, called
from sparsetrain.calibration import Calibration
from sparsetrain.candidates import unwrapped
from sparsetrain.channels.coupling import Coupling, couplings
from sparsetrain.channels.methods import ChannelMethod, Scoring, method_of
from sparsetrain.channels.rebuilding import Rebuilding, rebuilt
from sparsetrain.channels.removal import remove
from sparsetrain.channels.result import ChannelResult, Sizes
from sparsetrain.config import did_you_mean
from sparsetrain.curvature.evaluating import evaluating
from sparsetrain.curvature.losses import LossFunction
from sparsetrain.scores import Score

#: Share of channels to remove: of every layer, or by glob on the names of layers.
Ratio = float | Mapping[str, float]


def prune(
    model: nn.Module,
    example_inputs: Any,
    method: ChannelMethod | Score | str | Mapping[str, Any] = "l1",
    ratio: Ratio = 0.5,
    *,
    scope: Literal["layer", "global"] = "layer",
    round_to: int = 1,
    calibration: Iterable[Any] | None = None,
    loss_fn: LossFunction | None = None,
    adapter: Adapter | None = None,
    optimizer: Optimizer | None = None,
    in_place: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> ChannelResult:
    """Remove the channels that matter least from all layers that have them.

    Layers whose channels are added or multiplied lose the same ones. The model's outputs keep their
    shape, and every layer keeps a channel at least.

    Args:
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments, for one
            call of the model.
        method: a method or its name, "l1" or "l2"; or a score or its name.
        ratio: share of channels to remove, in [0, 1): of every layer, or a mapping from globs on
            names of layers; the first that fits counts, and layers that none fits stay as they are.
        scope: whether a layer's channels compete with each other or with those of all layers, after
            division by the mean size in their layer.
        round_to: kept channels are rounded up to a multiple of this.
        calibration: batches for methods that need data, as for `st.prune`.
        loss_fn: (outputs, targets) -> scalar, for methods that need a loss.
        optimizer: of the model, which goes on with what is left of its state; needs `in_place`.
        in_place: whether the model itself shrinks; otherwise a copy does.
        seed: of whatever is random.
        progress: whether to show a bar.

    Returns:
        The smaller model with a report.

    Raises:
        ImportError: torch-pruning (or scikit-learn, for LASSO) is not installed.
        TypeError: the method is none.
        ValueError: arguments that do not fit each other or the model, or a model whose layers
            cannot be followed; it stays as it was.
    """
    model = unwrapped(model)
    _check(model, optimizer, in_place, round_to)
    found = couplings(model, example_inputs)
    if not found:
        raise ValueError("the model has no channels that could be removed")
    asked = _ratios(ratio, found)
    wanted = [coupling for coupling in found if coupling.name in asked]
    given = Calibration(calibration, loss_fn, adapter, seed, progress)
    before = Sizes.of(model, example_inputs)
    smaller = copy.deepcopy(model)
    copied = {c.name: c for c in couplings(smaller, example_inputs)}
    match method_of(method):
        case Rebuilding() as rebuilding:
            if scope == "global":
                raise ValueError(f"channel method {rebuilding.kind!r} goes layer by layer")
            keep = _rounded(_by_layer(wanted, asked), wanted, round_to)
            originals = {c.name: c for c in found}
            removed = rebuilt(smaller, copied, model, originals, keep, rebuilding, given)
        case Scoring() as scoring:
            scores = scoring.scores(model, wanted, given)
            keep = _by_layer(wanted, asked) if scope == "layer" else _globally(scores, asked)
            keep = _rounded(keep, wanted, round_to)
            removed = {c.name: _least(c, scores[c.name], keep[c.name]) for c in wanted}
        case other:
            raise TypeError(f"method must be a channel method or a score, not {other!r}")
    removed = {name: channels for name, channels in removed.items() if channels}
    rebuilt_state = copy.deepcopy(smaller.state_dict()) if in_place else {}
    remove(removed, copied.values(), None)
    _check_same_outputs(model, smaller, example_inputs)
    if in_place:
        model.load_state_dict(rebuilt_state)
        remove(removed, found, optimizer)
        smaller = model
    layers = {c.name: _widths(c, removed.get(c.name, [])) for c in found}
    return ChannelResult(smaller, layers, removed, before, Sizes.of(smaller, example_inputs))


def _widths(coupling: Coupling, removed: Sequence[int]) -> tuple[int, int]:
    """Outputs of the coupling's first layer before and after."""
    first = next(s for s in coupling.by_role("out") if s.layer == coupling.name)
    return first.width, first.width - sum(len(first.places[channel]) for channel in removed)


def _check(model: nn.Module, optimizer: Any, in_place: bool, round_to: int) -> None:
    if round_to < 1:
        raise ValueError(f"round_to={round_to} must be 1 or more")
    if optimizer is not None and not in_place:
        raise ValueError("the optimizer has the parameters of the model itself: give in_place=True")
    if hasattr(optimizer, "masks"):
        raise ValueError("the optimizer holds masks of the model's weights: finalize() it first")
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            raise ValueError(
                f"{name} is behind a parametrization: finalize() the optimizer or remove it first"
            )


def _ratios(ratio: Ratio, found: Sequence[Coupling]) -> dict[str, float]:
    """Name of a coupling -> share to remove."""
    by_glob = ratio if isinstance(ratio, Mapping) else {"*": ratio}
    layers = {side.layer: coupling.name for coupling in found for side in coupling.by_role("out")}
    asked: dict[str, float] = {}
    for glob, share in by_glob.items():
        if not 0 <= share < 1:
            raise ValueError(f"ratio {share} of {glob!r} must be in [0, 1)")
        named = {layers[layer] for layer in layers if fnmatchcase(layer, glob)}
        if not named:
            near = did_you_mean(glob, layers)
            raise ValueError(f"ratio of {glob!r}: no layer of that name can lose channels{near}")
        for name in named:
            asked.setdefault(name, share)
    return asked


def _by_layer(wanted: Sequence[Coupling], asked: Mapping[str, float]) -> dict[str, int]:
    """How many channels each coupling keeps."""
    return {c.name: c.channels - math.floor(asked[c.name] * c.channels) for c in wanted}


def _globally(scores: Mapping[str, Tensor], asked: Mapping[str, float]) -> dict[str, int]:
    """How many channels each coupling keeps where all compete."""
    if len(set(asked.values())) > 1:
        raise ValueError("scope='global' has one ratio: give a number")
    relative = [values / values.abs().mean().clamp_min(1e-30) for values in scores.values()]
    every = torch.cat(relative)
    kept = torch.ones(len(every), dtype=torch.bool)
    kept[every.argsort(stable=True)[: math.floor(next(iter(asked.values())) * len(every))]] = False
    parts = torch.split(kept, [len(values) for values in relative])
    return {name: max(int(part.sum()), 1) for name, part in zip(scores, parts, strict=True)}


def _rounded(
    counts: Mapping[str, int], wanted: Sequence[Coupling], round_to: int
) -> dict[str, int]:
    return {
        c.name: min(math.ceil(counts[c.name] / round_to) * round_to, c.channels) for c in wanted
    }


def _least(coupling: Coupling, scores: Tensor, keep: int) -> list[int]:
    """The channels to remove, ascending."""
    return coupling.removable(scores.argsort(stable=True).tolist(), coupling.channels - keep)


def _check_same_outputs(model: nn.Module, smaller: nn.Module, example_inputs: Any) -> None:
    with evaluating(model), torch.no_grad():
        expected = called(model, example_inputs)
    try:
        with evaluating(smaller), torch.no_grad():
            outputs = called(smaller, example_inputs)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            "the smaller model does not run, so a layer was not followed rightly: leave its "
            f"channels out by a ratio for the others: {error}"
        ) from error
    if _shapes(expected) != _shapes(outputs):
        raise ValueError(
            f"outputs would have shapes {_shapes(outputs)} instead of {_shapes(expected)}: leave "
            "the layers that make them out by a ratio for the others"
        )


def _shapes(outputs: Any) -> list[tuple[int, ...]]:
    return [tuple(leaf.shape) for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
