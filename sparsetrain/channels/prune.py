"""st.channels.prune: fewer channels, for good."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from sparsetrain.batches import Adapter, called
from sparsetrain.calibration import Calibration
from sparsetrain.candidates import unwrapped
from sparsetrain.channels.counts import Plan, Ratio, check_rounding, shares, within
from sparsetrain.channels.coupling import Coupling, couplings
from sparsetrain.channels.cutting import Cutter
from sparsetrain.channels.methods import (
    ChannelMethod,
    LayerByLayer,
    Scope,
    Scoring,
    method_of,
)
from sparsetrain.channels.removal import check_optimizer, check_plain, check_removal, remove
from sparsetrain.channels.result import ChannelResult, Sizes
from sparsetrain.cost import latency
from sparsetrain.cost.targets import CostTarget, Flops, Parameters, target_of
from sparsetrain.curvature.losses import LossFunction
from sparsetrain.evaluating import evaluating
from sparsetrain.recipe import Rule
from sparsetrain.scores import Score


def prune(
    model: nn.Module,
    example_inputs: Any,
    method: ChannelMethod | Score | str | Mapping[str, Any] = "l1",
    ratio: Ratio | None = None,
    *,
    target: CostTarget | Mapping[str, Any] | None = None,
    flops: float | None = None,
    parameters: float | None = None,
    scope: Scope | None = None,
    floor: float = 0.0,
    round_to: int = 1,
    rules: Sequence[Rule | Mapping[str, Any]] = (),
    calibration: Iterable[Any] | None = None,
    loss_fn: LossFunction | None = None,
    adapter: Adapter | None = None,
    optimizer: Optimizer | None = None,
    in_place: bool = False,
    measure_latency: bool = True,
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
        target: instead of a ratio, what the smaller network may cost, such as `st.Flops(0.5)` or
            `st.ModelBytes("2MB")`: the same ratio everywhere (or the same threshold), as small as
            will do, but for single layers that may keep one step of rounding more.
        flops: short for `st.Flops(...)`; may be combined with the other targets.
        parameters: short for `st.Parameters(...)`.
        scope: whether a layer's channels compete with each other or with those of all layers, after
            division by the mean size in their layer. None: as the method's paper has it.
        floor: share of its channels that every layer keeps at least, in [0, 1).
        round_to: kept channels are rounded up to a multiple of this.
        rules: as in a recipe, `{"match": "stem", "dense": True}` or with a `sparsity` instead of
            `dense`, the share to remove. The first that speaks of a layer counts, before `ratio`.
        calibration: batches for methods that need data, as for `st.prune`.
        loss_fn: (outputs, targets) -> scalar, for methods that need a loss.
        optimizer: of the model, which goes on with what is left of its state, and of its masks if
            it is a `SparseOptimizer`; needs `in_place`.
        in_place: whether the model itself shrinks; otherwise a copy does.
        measure_latency: whether the report says how long a forward pass takes.
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
    _check(model, optimizer, in_place, floor, round_to)
    found = couplings(model, example_inputs)
    if not found:
        raise ValueError("the model has no channels that could be removed")
    targets = _targets(ratio, target, flops, parameters)
    if ratio is None and not targets:
        ratio = 0.5
    asked = shares(ratio, rules, model, found)
    wanted = [coupling for coupling in found if coupling.name in asked]
    chosen = method_of(method)
    given = Calibration(calibration, loss_fn, adapter, seed, progress)
    cutter = Cutter.of(model, example_inputs, found, wanted, chosen, given)
    if cutter.scores is not None:
        wanted = [coupling for coupling in wanted if coupling.name in cutter.scores]
    competing = _competing(chosen, scope, cutter.scores)
    plan = Plan(wanted, asked, competing, chosen.comparable, floor, round_to)
    counts = (
        within(targets, plan, model, found, example_inputs, cutter.orders)
        if targets
        else plan.at(0.0)
    )
    cut = cutter.cut(counts)
    smaller, removed = cut.model, cut.removed
    changed = copy.deepcopy(smaller.state_dict()) if in_place else {}
    cut.finish()
    _check_same_outputs(model, smaller, example_inputs)
    before, after = (Sizes.of(m, example_inputs) for m in (model, smaller))
    seconds = latency([model, smaller], example_inputs) if measure_latency else None
    if in_place:
        check_removal(model, changed, removed, found, optimizer)
        model.load_state_dict(changed)
        remove(removed, found, optimizer)
        smaller = model
    layers = {c.name: _widths(c, removed.get(c.name, [])) for c in found}
    return ChannelResult(smaller, layers, removed, before, after, seconds)


def _targets(
    ratio: Ratio | None,
    target: CostTarget | Mapping[str, Any] | None,
    flops: float | None,
    parameters: float | None,
) -> list[CostTarget]:
    short = {"flops": flops, "parameters": parameters}
    for name, share in short.items():
        if share is not None and not 0 < share <= 1:
            raise ValueError(f"{name}={share} must be the share that may be left, in (0, 1]")
    given = [] if target is None else [target_of(target)]
    given += [] if flops is None else [Flops(flops)]
    given += [] if parameters is None else [Parameters(parameters)]
    if given and ratio is not None:
        raise ValueError(f"give either a ratio or {' and '.join(t.kind for t in given)}")
    return given


def _competing(
    method: Scoring | LayerByLayer, scope: Scope | None, scores: Mapping[str, Tensor] | None
) -> Mapping[str, Tensor] | None:
    """The scores, if the channels of all layers compete."""
    if scope not in (None, "layer", "global"):
        raise ValueError(f"scope={scope!r} is not one of 'layer', 'global'")
    if (scope or method.scope) == "layer":
        return None
    if scores is None:
        raise ValueError(f"channel method {method.kind!r} goes layer by layer")
    return scores


def _widths(coupling: Coupling, removed: Sequence[int]) -> tuple[int, int]:
    """Outputs of the coupling's first layer before and after."""
    first = next(s for s in coupling.by_role("out") if s.layer == coupling.name)
    return first.width, first.width - sum(len(first.places[channel]) for channel in removed)


def _check(model: nn.Module, optimizer: Any, in_place: bool, floor: float, round_to: int) -> None:
    check_rounding(floor, round_to)
    if optimizer is not None and not in_place:
        raise ValueError("the optimizer has the parameters of the model itself: give in_place=True")
    check_optimizer(optimizer)
    check_plain(model)


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
