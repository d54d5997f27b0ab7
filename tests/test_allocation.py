from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import product
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as some
from pydantic import ValidationError

from sparsetrain._apportion import apportion, water_fill
from sparsetrain.allocation import (
    Allocation,
    ErdosRenyi,
    ErdosRenyiKernel,
    Explicit,
    Global,
    LayerShape,
    Uniform,
    active_total,
    allocate,
    parse_allocation,
)

SHARING = ["uniform", "uniform_first_dense", "erdos_renyi", "erdos_renyi_kernel", "global"]
LENET_300_100 = [(300, 784), (100, 300), (10, 100)]
LENET_5 = [(20, 1, 5, 5), (50, 20, 5, 5), (500, 800), (10, 500)]
BOTTLENECK = [(64, 64, 1, 1), (64, 64, 3, 3), (256, 64, 1, 1)]

sparsities = some.floats(0, 1, exclude_max=True)
shapes = some.lists(some.integers(1, 12), min_size=1, max_size=4).map(tuple)


def named(all_shapes: Sequence[tuple[int, ...]]) -> list[LayerShape]:
    return [LayerShape(f"fc{i}", shape) for i, shape in enumerate(all_shapes)]


def counts(allocation: Any, layers: Sequence[LayerShape], sparsity: float | None) -> list[int]:
    result = allocate(allocation, layers, sparsity)
    assert list(result) == [layer.name for layer in layers]
    return list(result.values())


@some.composite
def layer_lists(draw: Any, quanta: bool = False) -> list[LayerShape]:
    layers = named(draw(some.lists(shapes, min_size=1, max_size=6)))
    if not quanta:
        return layers
    limits = [some.integers(1, min(layer.numel, 30)) for layer in layers]
    return [layer._replace(quantum=draw(q)) for layer, q in zip(layers, limits, strict=True)]


def closest_below(total: int, lows: list[int], highs: list[int], quanta: list[int]) -> int:
    """The largest sum of multiples within the bounds that is at most `total`; all are listed."""
    sums = {0}
    for low, high, quantum in zip(lows, highs, quanta, strict=True):
        sums = {s + u * quantum for s in sums for u in range(low, high + 1)}
    return max(s for s in sums if s <= total)


@given(kind=some.sampled_from(SHARING), layers=layer_lists(), sparsity=sparsities)
def test_total_is_exact(kind: str, layers: list[LayerShape], sparsity: float) -> None:
    assume(kind != "uniform_first_dense" or len(layers) > 1)
    shared = layers[1:] if kind == "uniform_first_dense" else layers
    assume(active_total(sum(layer.numel for layer in shared), sparsity) >= len(shared))
    result = counts(kind, layers, sparsity)
    assert all(0 <= count <= layer.numel for count, layer in zip(result, layers, strict=True))
    if kind == "uniform_first_dense":
        assert result[0] == layers[0].numel
        layers, result = layers[1:], result[1:]
    total = round((1 - sparsity) * sum(layer.numel for layer in layers))
    assert sum(result) == total == active_total(sum(layer.numel for layer in layers), sparsity)
    assert min(result) >= 1


@given(kind=some.sampled_from(SHARING), layers=layer_lists(quanta=True), sparsity=sparsities)
def test_total_with_quanta_is_the_closest_below(
    kind: str, layers: list[LayerShape], sparsity: float
) -> None:
    assume(kind != "uniform_first_dense" or len(layers) > 1)
    shared = layers[1:] if kind == "uniform_first_dense" else layers
    total = active_total(sum(layer.numel for layer in shared), sparsity)
    if total < sum(layer.quantum for layer in shared):
        with pytest.raises(ValueError, match=r"layers such as .* empty"):
            counts(kind, layers, sparsity)
        return
    result = counts(kind, layers, sparsity)
    if kind == "uniform_first_dense":
        assert result[0] == layers[0].numel // layers[0].quantum * layers[0].quantum
        layers, result = layers[1:], result[1:]
    quanta = [layer.quantum for layer in layers]
    highs = [layer.numel // layer.quantum for layer in layers]
    lows = [1] * len(layers)
    units = [count // quantum for count, quantum in zip(result, quanta, strict=True)]
    assert [u * q for u, q in zip(units, quanta, strict=True)] == result
    assert all(low <= u <= high for low, u, high in zip(lows, units, highs, strict=True))
    assert sum(result) == closest_below(total, lows, highs, quanta)


def densify_by_iteration(
    numels: list[int], raw_densities: list[Fraction], total: int
) -> list[Fraction]:
    """ERK as published: solve epsilon, make the layer that exceeds 1 most dense, solve again."""
    dense: set[int] = set()
    while len(dense) < len(numels):
        sparse = [i for i in range(len(numels)) if i not in dense]
        budget = total - sum(numels[i] for i in dense)
        epsilon = Fraction(budget) / sum(numels[i] * raw_densities[i] for i in sparse)
        worst = max(sparse, key=lambda i: raw_densities[i])
        if epsilon * raw_densities[worst] <= 1:
            break
        dense.add(worst)
    return [
        Fraction(numel) if i in dense else epsilon * raw_densities[i] * numel
        for i, numel in enumerate(numels)
    ]


@given(layers=layer_lists(), sparsity=sparsities, kernel=some.booleans())
def test_erdos_renyi_is_the_published_iteration(
    layers: list[LayerShape], sparsity: float, kernel: bool
) -> None:
    numels = [layer.numel for layer in layers]
    seen = [layer.shape if kernel else (*layer.shape, 1)[:2] for layer in layers]
    raw = [Fraction(sum(shape), math.prod(shape)) for shape in seen]
    total = active_total(sum(numels), sparsity)
    ideal = densify_by_iteration(numels, raw, total)
    assume(min(ideal) >= 1)  # below that the promise of one weight a layer moves the shares
    result = counts(ErdosRenyiKernel() if kernel else ErdosRenyi(), layers, sparsity)
    assert all(abs(count - share) < 1 for count, share in zip(result, ideal, strict=True))


# By hand, at 90% sparsity. LeNet-300-100: epsilon = 26620 / (1084 + 400 + 110) asks for 1837 of
# the 1000 weights of fc2, so it is dense and epsilon = 25620 / 1484 = 17.264 for the others.
# LeNet-5: 43050 / 1921 makes the first and last layer dense, then 37550 / 1380 = 27.210.
# A ResNet-50 bottleneck: 5734 / 586 = 9.785, no layer dense.
@pytest.mark.parametrize(
    "all_shapes, expected",
    [
        (LENET_300_100, [18_714, 6_906, 1_000]),
        (LENET_5, [500, 2_177, 35_373, 5_000]),
        (BOTTLENECK, [1_272, 1_311, 3_151]),
    ],
)
def test_erdos_renyi_kernel_worked_by_hand(
    all_shapes: list[tuple[int, ...]], expected: list[int]
) -> None:
    assert counts("erk", named(all_shapes), 0.9) == expected


def test_erdos_renyi_gives_all_kernel_positions_one_density() -> None:
    layers = named([(64, 64, 1, 1), (64, 64, 3, 3)])
    assert counts("er", layers, 0.5) == [2_048, 18_432]
    assert counts("er", named(LENET_300_100), 0.9) == counts("erk", named(LENET_300_100), 0.9)


def test_epsilon_gives_the_connections_of_set() -> None:
    """Mocanu et al.: epsilon (fan_in + fan_out) connections; the last layer here has fewer."""
    layers = named([(1000, 784), (1000, 1000), (10, 1000)])
    assert counts(ErdosRenyi(epsilon=20), layers, None) == [35_680, 40_000, 10_000]
    assert counts(ErdosRenyi(epsilon=0.5), layers, None) == [892, 1_000, 505]
    assert counts(ErdosRenyi(epsilon=1e-6), layers, None) == [1, 1, 1]
    rows = [layer._replace(quantum=layer.shape[0]) for layer in layers]
    assert counts(ErdosRenyi(epsilon=1.6), rows, None) == [3_000, 3_000, 1_620]


def test_uniform_and_global_are_proportional_to_size() -> None:
    layers = named([(100, 10), (10, 10), (10, 2)])
    for kind in ("uniform", "global"):
        assert counts(kind, layers, 0.9) == [100, 10, 2]
        assert counts(kind, layers, 0.0) == [1000, 100, 20]
    # Shares 14.7, 0.7 and 0.7 of 16: ties go to the earlier layer, all keep one weight.
    assert counts("uniform", named([(21,), (1,), (1,)]), 0.3) == [14, 1, 1]
    assert counts("uniform", named([(5,), (5,), (5,)]), 0.5) == [3, 3, 2]


def test_uniform_first_dense() -> None:
    assert counts("uniform_first_dense", named(LENET_300_100), 0.9) == [235_200, 3_000, 100]
    with pytest.raises(ValueError, match="only layer 'fc0' dense: use uniform"):
        counts("uniform_first_dense", named([(3, 3)]), 0.5)


def test_explicit_takes_the_first_glob_that_matches() -> None:
    layers = [LayerShape(name, (10, 10)) for name in ("head.fc", "body.fc", "body.out")]
    densities = {"body.out": 1.0, "body.*": 0.25, "*": 0.1}
    assert counts(Explicit(densities=densities), layers, None) == [10, 25, 100]
    densities = {"*": 0.1, "body.out": 1.0}
    assert counts(Explicit(densities=densities), layers, None) == [10, 10, 10]
    blocks = [LayerShape("a", (10, 10), quantum=8), LayerShape("b", (10, 10), quantum=16)]
    assert counts(Explicit(densities={"a": 0.3, "b": 0.001}), blocks, None) == [32, 16]


def test_explicit_errors_name_the_nearest_layers() -> None:
    layers = [LayerShape("encoder.fc1", (4, 4)), LayerShape("head", (4, 4))]
    with pytest.raises(ValueError, match=r"'encoder\.f1' matches no layer; .* encoder\.fc1"):
        allocate(Explicit(densities={"encoder.f1": 0.5, "*": 0.5}), layers, None)
    with pytest.raises(ValueError, match="no density for layer 'head'"):
        allocate(Explicit(densities={"encoder.*": 0.5}), layers, None)
    for density in (0.0, 1.1, math.nan):
        with pytest.raises(ValidationError):
            Explicit(densities={"*": density})


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, math.nan, None])
@pytest.mark.parametrize("kind", SHARING)
def test_sparsity_must_be_given_and_below_one(kind: str, sparsity: float | None) -> None:
    with pytest.raises(ValueError, match=r"needs a sparsity in \[0, 1\)"):
        allocate(kind, named(LENET_5), sparsity)


def test_sparsity_must_not_be_given_twice() -> None:
    for allocation in (ErdosRenyi(epsilon=3), Explicit(densities={"*": 0.5})):
        with pytest.raises(ValueError, match="fixes the densities itself"):
            allocate(allocation, named(LENET_5), 0.5)


@pytest.mark.parametrize(
    "layers, message",
    [
        ([], "no layers"),
        ([LayerShape("a", (2, 2)), LayerShape("a", (3, 3))], "'a' is given twice"),
        ([LayerShape("a", (2, 0))], "'a' has no weights"),
        ([LayerShape("a", (2, 2), quantum=5)], "'a': quantum 5 must lie between 1 and its 4"),
        ([LayerShape("a", (2, 2), quantum=0)], "'a': quantum 0"),
    ],
)
def test_bad_layers(layers: list[LayerShape], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        allocate("uniform", layers, 0.5)


def test_names_of_allocations() -> None:
    assert parse_allocation("erk") == parse_allocation({"kind": "erk"}) == ErdosRenyiKernel()
    assert parse_allocation("er") == ErdosRenyi()
    assert parse_allocation({"kind": "er", "epsilon": 3}) == ErdosRenyi(epsilon=3)
    every: list[Allocation] = [Uniform(), Global(), Explicit(densities={"*": 0.1})]
    for allocation in every:
        assert parse_allocation(allocation) is allocation
        assert parse_allocation(allocation.model_dump()) == allocation
    with pytest.raises(ValueError, match="unknown allocation 'unifrom': did you mean 'uniform'"):
        parse_allocation("unifrom")
    with pytest.raises(ValueError, match="is not an allocation"):
        parse_allocation(0.5)  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="epsilon"):
        parse_allocation({"kind": "uniform", "epsilon": 3})


@some.composite
def problems(draw: Any) -> tuple[list[Fraction], list[int], list[int], int]:
    """Weights, lower bounds, upper bounds and a total between their sums."""
    weights = draw(some.lists(some.fractions(Fraction(1, 5), 20), min_size=1, max_size=4))
    lows = [draw(some.integers(0, 3)) for _ in weights]
    highs = [low + draw(some.integers(0, 5)) for low in lows]
    return weights, lows, highs, draw(some.integers(sum(lows), sum(highs)))


def fill_by_breakpoints(
    weights: list[Fraction], lows: list[int], highs: list[int], total: int
) -> list[Fraction]:
    """The sum of clip(x * weight) is linear between the x at which a value meets a bound."""
    bounds = list(zip(weights, lows, highs, strict=True))

    def at(x: Fraction) -> list[Fraction]:
        return [min(max(x * w, Fraction(low)), Fraction(high)) for w, low, high in bounds]

    points = {bound / weight for weight, *ends in bounds for bound in ends}
    left = max(x for x in points if sum(at(x)) <= total)
    right = min(x for x in points if sum(at(x)) >= total)
    below, above = sum(at(left)), sum(at(right))
    return at(left if below == above else left + (right - left) * (total - below) / (above - below))


@given(problem=problems())
def test_water_fill(problem: tuple[list[Fraction], list[int], list[int], int]) -> None:
    assert water_fill(*problem) == fill_by_breakpoints(*problem)


@given(data=some.data(), quantum=some.integers(1, 3))
def test_apportion_is_the_nearest_of_all_counts(data: Any, quantum: int) -> None:
    """Least squares from the ideal shares; of equals the one with more for earlier layers."""
    sizes = data.draw(some.lists(some.integers(1, 5), min_size=1, max_size=4))
    weights = [data.draw(some.fractions(Fraction(1, 5), 20)) for _ in sizes]
    units = data.draw(some.integers(0, sum(sizes)))
    low = 1 if units >= len(sizes) else 0
    ideal = fill_by_breakpoints(weights, [low] * len(sizes), sizes, units)

    def distance(shares: tuple[int, ...]) -> tuple[Fraction, list[int]]:
        squares = [(share - wish) ** 2 for share, wish in zip(shares, ideal, strict=True)]
        return sum(squares, Fraction(0)), [-share for share in shares]

    every = product(*(range(low, size + 1) for size in sizes))
    best = min((shares for shares in every if sum(shares) == units), key=distance)
    total = quantum * units + data.draw(some.integers(0, quantum - 1))
    got = apportion(weights, [quantum * n for n in sizes], [quantum] * len(sizes), total)
    assert got == [quantum * share for share in best]
