from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from pydantic import BaseModel, ValidationError
from torch import Tensor

from sparsetrain.selection import n_m_mask, select
from sparsetrain.structures import (
    NM,
    Block,
    ConstantFanIn,
    Structure,
    StructureField,
    Unstructured,
    parse_structure,
)

sizes = some.integers(1, 4)


@some.composite
def structured(draw: Any) -> tuple[Structure, tuple[int, ...]]:
    """A structure and a shape that it allows: a linear layer or a convolution of 1 to 3 dims."""
    kernel = tuple(draw(some.lists(sizes, max_size=3)))
    rows, columns, a, b = (draw(sizes) for _ in range(4))
    kind = draw(some.sampled_from(["unstructured", "n_m", "block", "constant_fan_in"]))
    if kind == "n_m":
        return NM(n=draw(some.integers(1, b)), m=b), (rows, columns * b, *kernel)
    if kind == "block":
        return Block(size=(a, b)), (rows * a, columns * b, *kernel)
    return parse_structure(kind), (rows, columns, *kernel)


def places(shape: tuple[int, ...]) -> Tensor:
    """Each weight holds its flat index."""
    return torch.arange(math.prod(shape)).reshape(shape)


@given(case=structured(), seed=some.integers(0, 999))
def test_expand_undoes_units(case: tuple[Structure, tuple[int, ...]], seed: int) -> None:
    """A mask goes to units and back; of a block that is kept, every weight counts."""
    structure, shape = case
    structure.check(shape, "")
    groups, units = structure.units(torch.zeros(shape)).shape
    unit_mask = torch.rand(groups, units, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask = structure.expand(unit_mask, shape)
    assert mask.shape == shape and mask.dtype == torch.bool
    weights_in_unit = math.prod(shape) // (groups * units)
    assert torch.equal(structure.units(mask.float()), unit_mask * float(weights_in_unit))
    kept_in_a_group = structure.n if isinstance(structure, NM) else 1
    assert structure.quantum(shape) == groups * weights_in_unit * kept_in_a_group


@given(rows=sizes, groups=sizes, m=sizes, kernel=some.lists(sizes, max_size=2).map(tuple))
def test_n_m_groups_are_consecutive_inputs(
    rows: int, groups: int, m: int, kernel: tuple[int, ...]
) -> None:
    shape = (rows, groups * m, *kernel)
    index = places(shape).reshape(rows, groups * m, -1)
    expected = [
        index[row, group * m : (group + 1) * m, position].tolist()
        for row in range(rows)
        for group in range(groups)
        for position in range(index.shape[2])
    ]
    assert NM(n=1, m=m).units(places(shape)).tolist() == expected


@given(rows=sizes, columns=sizes, a=sizes, b=sizes, kernel=some.lists(sizes, max_size=2).map(tuple))
def test_blocks_are_rectangles_of_the_flattened_matrix(
    rows: int, columns: int, a: int, b: int, kernel: tuple[int, ...]
) -> None:
    shape = (rows * a, columns * b, *kernel)
    block = Block(size=(a, b))
    matrix = places(shape).double().reshape(rows * a, -1)
    down, right = range(0, matrix.shape[0], a), range(0, matrix.shape[1], b)
    sums = [float(matrix[i : i + a, j : j + b].sum()) for i in down for j in right]
    assert block.units(places(shape).double()).tolist() == [sums]

    number = torch.arange(len(sums)).reshape(1, -1)
    spread = block.expand(number, shape).reshape(rows * a, -1)
    corners = [(i, j) for i in down for j in right]
    for k, (i, j) in enumerate(corners):
        assert (spread[i : i + a, j : j + b] == k).all()


def test_block_sums_of_half_precisions_are_taken_in_float32() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        scores = torch.full((4, 4), 257.0, dtype=dtype)
        expected = float(scores[0, 0]) * 16
        assert Block(size=(4, 4)).units(scores).tolist() == [[expected]]
    tall = torch.full((8, 2), 6e4, dtype=torch.float16)
    assert Block(size=(8, 2)).units(tall).isfinite().all()


def test_groups_of_constant_fan_in_are_outputs() -> None:
    index = places((2, 3, 1, 2))
    assert ConstantFanIn().units(index).tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert Unstructured().units(index).tolist() == [list(range(12))]


@given(case=structured(), seed=some.integers(0, 999), share=some.floats(0, 1))
def test_the_best_units_of_every_group_are_selected(
    case: tuple[Structure, tuple[int, ...]], seed: int, share: float
) -> None:
    structure, shape = case
    scores = torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(seed)).float()
    units = structure.units(scores).tolist()
    keep = structure.n if isinstance(structure, NM) else round(share * len(units[0]))
    best = [sorted(range(len(group)), key=lambda i: (-group[i], i))[:keep] for group in units]
    expected = [[i in kept for i in range(len(units[0]))] for kept in best]
    k = round(scores.numel() * keep / len(units[0]))
    mask = select(scores, k, structure)
    assert int(mask.sum()) == k
    assert torch.equal(mask, structure.expand(torch.tensor(expected), shape))


@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 3), (6, 8, 3, 2)])
def test_structures_hold_in_linear_layers_and_convolutions(shape: tuple[int, ...]) -> None:
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    k = math.prod(shape) // 4
    one_of_four = select(scores, k, NM(n=1, m=4))
    assert (one_of_four.unflatten(1, (-1, 4)).sum(2) == 1).all()
    assert torch.equal(one_of_four, n_m_mask(scores, 1, 4))
    assert (select(scores, k, ConstantFanIn()).flatten(1).sum(1) == k // 6).all()
    blocks = (
        select(scores, k, Block(size=(3, 4))).flatten(1).unflatten(1, (-1, 4)).unflatten(0, (2, 3))
    )
    assert torch.equal(blocks.all(3).all(1), blocks.any(3).any(1))
    assert int(blocks.sum()) == k


@pytest.mark.parametrize(
    "k, structure, message",
    [
        (6, NM(n=1, m=2), "k=6 must be exactly 12"),
        (6, ConstantFanIn(), "k=6 must be a multiple of 4"),
        (6, Block(size=(2, 2)), "k=6 must be a multiple of 4"),
        (12, NM(n=2, m=4), "6 inputs are not divisible by m=4"),
        (28, ConstantFanIn(), "cannot select k=28 of 24"),
    ],
)
def test_counts_that_a_structure_forbids(k: int, structure: Structure, message: str) -> None:
    with pytest.raises(ValueError, match=f"layer 'fc1'.* {message}"):
        select(torch.ones(4, 6), k, structure, name="fc1")


@given(case=structured())
def test_memory_layout_does_not_matter(case: tuple[Structure, tuple[int, ...]]) -> None:
    structure, shape = case
    scores = places(shape).float()
    transposed = scores.transpose(0, -1).contiguous().transpose(0, -1)
    assert torch.equal(structure.units(transposed), structure.units(scores))


def test_quanta_and_fixed_counts() -> None:
    shape = (8, 16, 3, 3)
    assert Unstructured().quantum(shape) == 1
    assert ConstantFanIn().quantum(shape) == 8
    assert Block(size=(4, 9)).quantum(shape) == 36
    assert NM(n=3, m=4).quantum(shape) == NM(n=3, m=4).fixed_count(shape) == 864
    for free in (Unstructured(), ConstantFanIn(), Block(size=(4, 9))):
        assert free.fixed_count(shape) is None


@pytest.mark.parametrize(
    "structure, shape, message",
    [
        (Unstructured(), (3, 0), r"layer 'fc1' has no weights \(shape \(3, 0\)\)"),
        (NM(n=2, m=4), (8,), "2:4 needs a weight of at least two non-empty dimensions"),
        (NM(n=2, m=4), (8, 10), "10 inputs are not divisible by m=4; exclude it with a rule"),
        (NM(n=2, m=4), (4, 3, 4, 4), "3 inputs are not divisible"),
        (Block(size=(2, 2)), (8,), "block needs a weight of at least two"),
        (Block(size=(4, 4)), (6, 8), "6 x 8 matrix is not divisible into blocks of 4 x 4"),
        (Block(size=(4, 4)), (8, 2, 3), "8 x 6 matrix is not divisible into blocks of 4 x 4"),
        (ConstantFanIn(), (8,), "constant fan-in needs a weight of at least two"),
        (ConstantFanIn(), (8, 0), "constant fan-in needs a weight of at least two non-empty"),
    ],
)
def test_shapes_that_do_not_fit_name_the_layer(
    structure: Structure, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        structure.check(shape, "fc1")
    assert "'fc1'" in str(error.value)


def test_a_block_may_cross_kernel_positions() -> None:
    Block(size=(4, 4)).check((8, 2, 2), "conv")


def test_names_of_structures() -> None:
    class Settings(BaseModel):
        structure: StructureField

    for value, expected in [
        ("unstructured", Unstructured()),
        ("constant_fan_in", ConstantFanIn()),
        ("n_m", NM(n=2, m=4)),
        ("1:8", NM(n=1, m=8)),
        ({"kind": "block", "size": [4, 2]}, Block(size=(4, 2))),
    ]:
        assert parse_structure(value) == expected  # type: ignore[arg-type]
        assert parse_structure(expected) is expected
        assert parse_structure(expected.model_dump()) == expected
        assert Settings(structure=value).structure == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "value, message",
    [
        ("constant_fanin", "unknown structure 'constant_fanin': did you mean 'constant_fan_in'"),
        ("4x4", "unknown structure '4x4': choose one of unstructured, n_m"),
        (124, r"n:m in quotes \(YAML reads an unquoted 2:4 as a number\)"),
        ("4:2", "n=4 is larger than m=2"),
        ("0:4", "greater than or equal to 1"),
        ("block", "size"),
        ({"kind": "block", "size": [0, 4]}, "greater than or equal to 1"),
        ({"kind": "unstructured", "size": [4, 4]}, "size"),
    ],
)
def test_bad_structures(value: Any, message: str) -> None:
    with pytest.raises((ValueError, ValidationError), match=message):
        parse_structure(value)
