"""Patterns: flat indices and back, seen by columns, and a check that lets no damage through."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as some
from torch import Tensor

from sparsetrain.storage.csr.pattern import Pattern, as_matrix, check

MOST = 2**31 - 1


@some.composite
def places(draw: some.DrawFn) -> tuple[tuple[int, int], list[int]]:
    """A shape and flat indices in it, from none to all, with empty rows and columns."""
    shape = draw(some.integers(1, 7)), draw(some.integers(1, 7))
    numel = shape[0] * shape[1]
    kind = draw(some.sampled_from(["some", "some", "some", "none", "one", "all"]))
    if kind == "none":
        return shape, []
    if kind == "one":
        return shape, [draw(some.integers(0, numel - 1))]
    if kind == "all":
        return shape, list(range(numel))
    return shape, sorted(draw(some.sets(some.integers(0, numel - 1))))


def make(shape: tuple[int, int], flat: list[int]) -> Pattern:
    return Pattern.of(torch.tensor(flat, dtype=torch.int64), shape)


def ints(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


@given(places())
def test_flat_indices_make_a_pattern_and_come_back(
    place: tuple[tuple[int, int], list[int]],
) -> None:
    shape, flat = place
    pattern = make(shape, flat)
    assert pattern.shape == shape
    assert pattern.nnz == len(flat)
    assert pattern.density == len(flat) / math.prod(shape)
    for tensor in (pattern.pointers, pattern.columns, pattern.rows()):
        assert tensor.dtype == torch.int32 and tensor.is_contiguous()
    by_rows = [[i % shape[1] for i in flat if i // shape[1] == row] for row in range(shape[0])]
    pointers = pattern.pointers.tolist()
    assert pointers[0] == 0 and pointers[-1] == len(flat)
    for row, columns in enumerate(by_rows):
        assert pattern.columns[pointers[row] : pointers[row + 1]].tolist() == columns
    assert pattern.rows().tolist() == [i // shape[1] for i in flat]
    back = pattern.flat()
    assert back.dtype == torch.int64
    assert back.tolist() == flat  # ascending and unique, as they were given


@given(places())
def test_seen_by_columns_it_is_the_transposed_matrix(
    place: tuple[tuple[int, int], list[int]],
) -> None:
    shape, flat = place
    pattern = make(shape, flat)
    number = {divmod(i, shape[1]): k for k, i in enumerate(flat)}
    walk = [
        (column, row, number[row, column])
        for column in range(shape[1])
        for row in range(shape[0])
        if (row, column) in number
    ]
    turned = pattern.transposed()
    for tensor in turned:
        assert tensor.dtype == torch.int32 and tensor.is_contiguous()
    assert turned.rows.tolist() == [row for _, row, _ in walk]
    assert turned.order.tolist() == [k for _, _, k in walk]
    ends = [sum(c < column for c, _, _ in walk) for column in range(shape[1] + 1)]
    assert turned.pointers.tolist() == ends
    assert turned.order[turned.place.long()].tolist() == list(range(len(flat)))
    assert turned.place[turned.order.long()].tolist() == list(range(len(flat)))


def test_it_is_turned_once() -> None:
    pattern = make((3, 4), [0, 5, 6])
    assert pattern.transposed() is pattern.transposed()


@given(places())
def test_copies_and_pickles_are_equal_and_carry_no_more_than_they_must(
    place: tuple[tuple[int, int], list[int]],
) -> None:
    pattern = make(*place)
    lean = len(pickle.dumps(pattern))
    turned = pattern.transposed()
    assert len(pickle.dumps(pattern)) == lean
    for again in (copy.deepcopy(pattern), pickle.loads(pickle.dumps(pattern))):
        assert again == pattern and again is not pattern
        assert again.columns.data_ptr() != pattern.columns.data_ptr() or pattern.nnz == 0
        for mine, other in zip(turned, again.transposed(), strict=True):
            assert torch.equal(mine, other)


def test_equality_is_of_shape_and_places() -> None:
    pattern = make((2, 6), [1, 7])
    assert pattern == make((2, 6), [1, 7])
    assert pattern != make((2, 6), [1, 8])
    assert pattern != make((2, 6), [1])
    assert make((2, 6), [1]) != make((6, 2), [1])
    assert make((1, 2), [0]) != make((1, 3), [0])
    assert make((2, 2), [0, 1]) != make((2, 2), [0, 2])  # the same columns in other rows
    assert pattern != "a pattern"
    assert len({pattern, pattern}) == 1


def test_bytes_count_what_is_held() -> None:
    pattern = make((3, 5), [0, 7, 14])
    assert pattern.memory() == 4 * (3 + 1) + 4 * 3
    pattern.transposed()
    assert pattern.memory() == 4 * (3 + 1) + 4 * 3 + 4 * (5 + 1) + 3 * 4 * 3


def test_indices_of_64_bits_are_taken_and_held_in_32() -> None:
    pattern = Pattern((2, 3), ints(0, 1, 2, dtype=torch.int64), ints(2, 0, dtype=torch.int64))
    assert pattern.columns.dtype == pattern.pointers.dtype == torch.int32
    assert pattern.flat().tolist() == [2, 3]


def test_flat_indices_go_beyond_32_bits() -> None:
    shape = (100_000, 100_000)
    flat = torch.tensor([0, 2**31, 2**33 + 7, 10**10 - 1])
    pattern = Pattern.of(flat, shape)
    assert torch.equal(pattern.flat(), flat)
    assert pattern.density == pytest.approx(4e-10)
    turned = pattern.transposed()
    assert turned.order[turned.place.long()].tolist() == [0, 1, 2, 3]
    check(shape, pattern.pointers, pattern.columns)


@pytest.mark.parametrize("shape", [(MOST + 1, 1), (1, MOST + 1)])
def test_more_rows_or_columns_than_32_bits_count_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"2,147,483,647 non-zeros, rows and columns"):
        Pattern(shape, ints(0), ints())


@pytest.mark.parametrize(
    ("shape", "matrix"), [((3, 4), (3, 4)), ((8, 4, 3, 2), (8, 24)), ((5,), (5, 1))]
)
def test_a_weight_is_a_matrix_of_outputs(shape: tuple[int, ...], matrix: tuple[int, int]) -> None:
    assert as_matrix(shape) == matrix


# The check, of which a checkpoint's safety hangs: kernels read memory at these indices unchecked.


@given(places(), some.sampled_from([torch.int32, torch.int64]))
def test_what_is_right_is_accepted(
    place: tuple[tuple[int, int], list[int]], dtype: torch.dtype
) -> None:
    pattern = make(*place)
    check(place[0], pattern.pointers.to(dtype), pattern.columns.to(dtype))


@pytest.mark.parametrize(
    ("pointers", "columns", "message"),
    [
        (ints(0, 1, 2).float(), ints(0, 1), "row pointers are not a vector of int32 or int64"),
        (ints(0, 1, 2), ints(0, 1).double(), "columns are not a vector of int32 or int64"),
        (ints(0, 1, 2), ints(0, 1).to(torch.int16), "columns are not a vector of int32 or int64"),
        (ints(0, 1, 2), ints(0, 1) > 0, "columns are not a vector"),
        (ints(0, 1, 2).view(1, 3), ints(0, 1), "row pointers are not a vector"),
        (ints(0, 1, 2), ints(0, 1).view(2, 1), "columns are not a vector"),
        (torch.tensor(0, dtype=torch.int32), ints(), "row pointers are not a vector"),
        (ints(0, 2), ints(0, 1), "2 row pointers for 2 rows"),
        (ints(0, 1, 1, 2), ints(0, 1), "4 row pointers for 2 rows"),
        (ints(), ints(), "0 row pointers for 2 rows"),
        (ints(1, 1, 2), ints(0, 1), "do not rise from 0 to 2"),
        (ints(-1, 1, 2), ints(0, 1), "do not rise from 0 to 2"),
        (ints(0, 1, 1), ints(0, 1), "do not rise from 0 to 2"),
        (ints(0, 1, 3), ints(0, 1), "do not rise from 0 to 2"),
        (ints(0, 3, 2), ints(0, 1), "do not rise from 0 to 2"),
        (ints(0, -1, 2), ints(0, 1), "do not rise from 0 to 2"),
        (ints(0, 1, 2), ints(0, 3), "outside of 0 to 2"),
        (ints(0, 1, 2), ints(-1, 0), "outside of 0 to 2"),
        (ints(0, 1, 2), ints(0, MOST), "outside of 0 to 2"),
        (ints(0, 2, 2), ints(1, 1), "do not ascend"),  # twice the same place
        (ints(0, 2, 2), ints(1, 0), "do not ascend"),
        (ints(0, 0, 2), ints(1, 0), "do not ascend"),
        (ints(0, 3, 4), ints(0, 2, 1, 0), "do not ascend"),
    ],
)
def test_damage_is_refused_and_named(pointers: Tensor, columns: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check((2, 3), pointers, columns)


def is_pattern(shape: tuple[int, int], pointers: list[int], columns: list[int]) -> bool:
    """The slow twin of `check`."""
    if len(pointers) != shape[0] + 1 or pointers[0] != 0 or pointers[-1] != len(columns):
        return False
    if any(a > b for a, b in itertools.pairwise(pointers)):
        return False
    rows = [columns[a:b] for a, b in itertools.pairwise(pointers)]
    return all(all(0 <= c < shape[1] for c in row) and row == sorted(set(row)) for row in rows)


@settings(max_examples=200)
@given(
    rows=some.integers(1, 4),
    pointers=some.lists(some.integers(0, 4) | some.integers(-(2**31), MOST), max_size=5),
    columns=some.lists(some.integers(0, 2) | some.integers(-(2**31), MOST), max_size=4),
    dtype=some.sampled_from([torch.int32, torch.int64]),
)
# Differences of such pointers wrap around in 32 bits and look as if they rose.
@example(rows=3, pointers=[0, MOST, -2, 3], columns=[0, 1, 2], dtype=torch.int32)
@example(rows=3, pointers=[0, MOST, -2, 0], columns=[], dtype=torch.int32)
def test_the_check_agrees_with_its_slow_twin(
    rows: int, pointers: list[int], columns: list[int], dtype: torch.dtype
) -> None:
    shape, right = (rows, 3), is_pattern((rows, 3), pointers, columns)
    try:
        check(shape, ints(*pointers, dtype=dtype), ints(*columns, dtype=dtype))
    except ValueError:
        assert not right
    else:
        assert right
