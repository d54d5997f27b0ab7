"""Hypothesis strategies for what sparse training is made of: shapes, masks, schedules, policies.

Everything that `policies` draws is valid and trains on the network that it is drawn for. Shrinking
goes towards small, dense and plain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsetrain.candidates import find_candidates
from sparsetrain.policies import LearnedPolicy, Policy
from sparsetrain.schedules import Schedule, ScheduleShape, UpdateSchedule
from sparsetrain.structures import NM, Block, ConstantFanIn, Structure, Unstructured
from sparsetrain.testing.problem import STEPS, SmallNet

try:
    from hypothesis import strategies as some
    from hypothesis.strategies import DrawFn, SearchStrategy
except ImportError as error:
    raise ImportError(
        "sparsetrain.testing.strategies needs hypothesis: pip install 'sparsetrain[testing]'"
    ) from error

Shape = tuple[int, ...]
Fields = dict[str, Any]

_CURVES: list[ScheduleShape] = ["constant", "linear", "cosine", "cubic", "cyclic"]
_shares = some.floats(0, 1)


def shapes_of(model: nn.Module) -> list[Shape]:
    """Shapes of the weights that a policy makes sparse, in model order."""
    return [tuple(c.param.shape) for c in find_candidates(model) if c.is_default]


def shapes(*, dims: tuple[int, int] = (2, 4), side: int = 8) -> SearchStrategy[Shape]:
    """Shapes of weights: `dims` from least to most dimensions, of 1 to `side` each."""
    return some.lists(some.integers(1, side), min_size=dims[0], max_size=dims[1]).map(tuple)


@some.composite
def masks(draw: DrawFn, shape: SearchStrategy[Shape] | Shape | None = None) -> Tensor:
    """Bool tensors with any number of active weights, from none to all.

    Args:
        shape: of the weight, or a strategy for it.
    """
    wanted = draw(shapes()) if shape is None else shape
    size = wanted if isinstance(wanted, tuple) else draw(wanted)
    numel = math.prod(size)
    active, seed = draw(some.integers(0, numel)), draw(some.integers(0, 2**32 - 1))
    order = torch.randperm(numel, generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(numel, dtype=torch.bool)
    mask[order[:active]] = True
    return mask.view(size)


def sparsities(highest: float = 0.99, *, lowest: float = 0.0) -> SearchStrategy[float]:
    """Shares of zeros, from `lowest` to `highest`."""
    return some.floats(lowest, highest)


def structures(of: Sequence[Shape]) -> SearchStrategy[Structure]:
    """Structures that weights of all these shapes can have."""
    inputs = math.gcd(*(shape[1] for shape in of))
    rows = math.gcd(*(shape[0] for shape in of))
    columns = math.gcd(*(math.prod(shape[1:]) for shape in of))
    sizes = some.tuples(some.sampled_from(_divisors(rows)), some.sampled_from(_divisors(columns)))
    return some.one_of(
        some.just(Unstructured()),
        some.just(ConstantFanIn()),
        sizes.map(lambda size: Block(size=size)),
        n_m_structures(inputs),
    )


@some.composite
def n_m_structures(draw: DrawFn, inputs: int) -> NM:
    """n of m for weights whose inputs are a multiple of `inputs`."""
    m = draw(some.sampled_from(_divisors(inputs)))
    return NM(n=draw(some.integers(1, m)), m=m)


def allocations() -> SearchStrategy[Fields]:
    """Allocations in which layers share a sparsity, as a recipe has them; without 'global'."""
    kinds = ["uniform", "uniform_first_dense", "erdos_renyi", "erdos_renyi_kernel"]
    return some.sampled_from(kinds).map(lambda kind: {"kind": kind})


def densities(highest: float = 1.0) -> SearchStrategy[Fields]:
    """Allocations that give the densities themselves, so that there is no sparsity.

    Args:
        highest: density of all layers, where one is written down for them.
    """
    return some.one_of(
        some.floats(0.05, highest).map(lambda d: {"kind": "explicit", "densities": {"*": d}}),
        some.floats(0.1, 20).map(lambda epsilon: {"kind": "erdos_renyi", "epsilon": epsilon}),
    )


@some.composite
def schedules(draw: DrawFn, lowest: float = 0.0, highest: float = 1.0) -> Schedule:
    """Curves over training with both ends from `lowest` to `highest`."""
    shape, ends = draw(some.sampled_from(_CURVES)), some.floats(lowest, highest)
    cycles = draw(some.integers(1, 4)) if shape == "cyclic" else 1
    return Schedule(shape=shape, initial=draw(ends), final=draw(ends), cycles=cycles)


@some.composite
def update_schedules(draw: DrawFn, total_steps: int, default: float = 0.75) -> UpdateSchedule:
    """When masks change in a training of so many steps: once at least.

    Args:
        default: end of the updates where the schedule names none, as a share of `total_steps`.
    """
    stop = draw(some.none() | some.integers(1, total_steps) | some.floats(1 / total_steps, 1))
    end = UpdateSchedule(stop=stop).stop_step(total_steps, default)
    assert end is not None  # total_steps is known
    start = draw(some.integers(0, end - 1))
    return UpdateSchedule(every=draw(some.integers(1, 6)), start=start, stop=stop)


@some.composite
def policies(
    draw: DrawFn,
    kinds: Sequence[str] | None = None,
    *,
    steps: int = STEPS,
    model: nn.Module | None = None,
) -> Policy:
    """Valid policies for a short training of a network.

    Args:
        kinds: to choose from; every kind of the library by default.
        steps: of the training; `total_steps` of the policies.
        model: whose weights they are for; the network of `check_policy` by default.
    """
    of = shapes_of(SmallNet() if model is None else model)
    kind = draw(some.sampled_from(sorted(_FIELDS) if kinds is None else list(kinds)))
    if kind not in _FIELDS:
        raise ValueError(f"there is no strategy for policies of kind {kind!r}: {list(_FIELDS)}")
    policy = cast(type[Policy], Policy.members[kind])
    data = draw(_FIELDS[kind](of))
    if "total_steps" in policy.model_fields:
        data["total_steps"] = steps
    if "update" in policy.model_fields:
        data["update"] = draw(_updates_of(policy, steps))
    return policy.model_validate(data)


def _updates_of(policy: type[Policy], steps: int) -> SearchStrategy[UpdateSchedule]:
    if issubclass(policy, LearnedPolicy):  # steering needs the time that there is
        return some.builds(UpdateSchedule, every=some.integers(1, 3))
    return update_schedules(steps, getattr(policy, "default_stop", 1.0))


# Fields of each kind, for weights of these shapes. "how sparse" comes with what it depends on.


@some.composite
def _how_sparse(
    draw: DrawFn,
    of: list[Shape],
    *,
    structured: bool = False,
    ranked: bool = False,
    lowest: float = 0.0,
) -> Fields:
    """Sparsity, allocation and structure that fit together.

    Args:
        structured: whether the policy has structures.
        ranked: whether the policy has the allocation 'global', in which layers compete.
    """
    structure = draw(structures(of)) if structured else Unstructured()
    if isinstance(structure, NM):
        return {"structure": structure}
    shared = allocations() | some.just({"kind": "global"}) if ranked else allocations()
    allocation = draw(allocations() if not isinstance(structure, Unstructured) else shared)
    sharing = of[1:] if allocation["kind"] == "uniform_first_dense" else of
    least = sum(structure.quantum(shape) for shape in sharing)
    highest = 1 - least / sum(math.prod(shape) for shape in sharing)
    sparsity = draw(sparsities(min(highest, 0.97), lowest=lowest))
    return {"sparsity": sparsity, "allocation": allocation, "structure": structure}


def _how_dense(of: list[Shape]) -> SearchStrategy[Fields]:
    return densities().map(lambda allocation: {"allocation": allocation})


def _static(of: list[Shape]) -> SearchStrategy[Fields]:
    score = some.sampled_from(["random", "magnitude"])
    sparse = _how_sparse(of, structured=True, ranked=True) | _how_dense(of)
    return _together(sparse, some.fixed_dictionaries({"score": score}))


def _set(of: list[Shape]) -> SearchStrategy[Fields]:
    drop = some.sampled_from(["magnitude", "magnitude_by_sign"])
    of_weights = some.fixed_dictionaries({"drop": drop, "grow_std": some.floats(0, 0.5)})
    return some.one_of(
        _together(_how_sparse(of, structured=True), _drops()),
        _together(_how_sparse(of) | _how_dense(of), _drops(), of_weights),
    )


def _rigl(of: list[Shape]) -> SearchStrategy[Fields]:
    return _together(_how_sparse(of, structured=True) | _how_dense(of), _drops())


def _snfs(of: list[Shape]) -> SearchStrategy[Fields]:
    momentum = some.fixed_dictionaries({"momentum": some.floats(0, 0.99)})
    # There has to be room: connections that move between layers need a place to go.
    sparse = _how_sparse(of, ranked=True, lowest=0.05)
    return _together(sparse, _drops(), momentum)


@some.composite
def _gradual(draw: DrawFn, of: list[Shape]) -> Fields:
    sparse = _how_sparse(of, structured=True, ranked=True)
    data: Fields = draw(sparse.filter(lambda fields: "sparsity" in fields))
    scores = ["magnitude", "random", "gradient", "taylor", "movement"]
    data["score"] = draw(some.sampled_from(scores))
    data["shape"] = draw(some.sampled_from(["cubic", "linear", "cosine"]))
    data["initial_sparsity"] = data["sparsity"] * draw(_shares)
    return data


def _surgery(of: list[Shape]) -> SearchStrategy[Fields]:
    rates = some.fixed_dictionaries(
        {"margin": some.floats(0, 0.9), "gamma": some.floats(0, 1e-3), "power": some.floats(0, 2)}
    )
    by_threshold = some.fixed_dictionaries({"c_rate": some.floats(-1, 1)})
    return _together(_how_sparse(of) | _how_dense(of) | by_threshold, rates)


@some.composite
def _n_m(draw: DrawFn, of: list[Shape]) -> Fields:
    structure = draw(
        n_m_structures(math.gcd(*(shape[1] for shape in of))).filter(lambda s: s.m > 1)
    )
    return {"n": structure.n, "m": structure.m, "decay": draw(some.floats(0, 1e-2))}


def _slimming(of: list[Shape]) -> SearchStrategy[Fields]:
    return some.fixed_dictionaries({"strength": some.floats(1e-6, 0.1)})


@some.composite
def _learned(draw: DrawFn, of: list[Shape], kind: str) -> Fields:
    """A sparsity to be steered to, or a strength; layers compete or have their shares."""
    data = draw(_LEARNED[kind])
    # Gates of whole units stop within a unit of the count, so the last ones are left alone.
    sparse = some.fixed_dictionaries(
        {"sparsity": sparsities(0.8), "allocation": allocations() | some.just({"kind": "global"})}
    )
    strength = some.fixed_dictionaries({"strength": some.floats(1e-6, 1e-2)})
    ranks = kind == "movement" and data["mode"] == "top_k"
    return data | draw(sparse if ranks else sparse | strength)


def _drops() -> SearchStrategy[Fields]:
    curve = _shares | schedules()
    return some.fixed_dictionaries({"drop_fraction": curve})


def _together(*parts: SearchStrategy[Fields]) -> SearchStrategy[Fields]:
    def joined(fields: tuple[Fields, ...]) -> Fields:
        return {key: value for some_fields in fields for key, value in some_fields.items()}

    return some.tuples(*parts).map(joined)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


_PER = some.sampled_from(["weight", "input", "output"])
_RATES = some.floats(0.05, 0.95)
_LEARNED: dict[str, SearchStrategy[Fields]] = {
    "soft_threshold": some.fixed_dictionaries(
        {
            "per": some.sampled_from(["layer", "output"]),
            "curve": some.sampled_from(["sigmoid", "exponential"]),
            "initial": some.floats(-12, -4),
        }
    ),
    "hard_concrete": some.fixed_dictionaries({"per": _PER, "drop_rate": _RATES}),
    "gumbel_softmax": some.fixed_dictionaries(
        {"per": _PER, "hard": some.booleans(), "keep_rate": _RATES}
    ),
    "variational_dropout": some.fixed_dictionaries({"local": some.booleans()}),
    "movement": some.fixed_dictionaries({"mode": some.sampled_from(["top_k", "threshold"])}),
}
_FIELDS: dict[str, Any] = {
    "static": _static,
    "set": _set,
    "rigl": _rigl,
    "snfs": _snfs,
    "gradual": _gradual,
    "dynamic_network_surgery": _surgery,
    "nm_sparse": _n_m,
    "slimming": _slimming,
    **{kind: (lambda of, kind=kind: _learned(of, kind)) for kind in _LEARNED},
}
