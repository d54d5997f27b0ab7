"""Growth in blocks, and exchanges of connections, against dense twins."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from csr_targets import NAME, Pair, brute_largest
from hypothesis import given, settings
from hypothesis import strategies as some
from sparse_twins import dense_weight, random_mask, spread
from torch import Tensor

from sparsetrain.storage.csr import growth
from sparsetrain.storage.csr.growth import largest_in_blocks
from sparsetrain.storage.csr.pattern import Pattern


def rows_of(matrix: Tensor) -> Any:
    return lambda start, stop: matrix[start:stop].clone()


# The largest entries of a matrix that comes in blocks.


@settings(max_examples=150)
@given(
    rows=some.integers(1, 9),
    columns=some.integers(1, 7),
    block=some.sampled_from([1, 5, 12, 20, 1000]),
    share=some.floats(0, 1),
    room=some.floats(0, 1),
    kinds=some.sampled_from([1, 2, 4, 1000]),
    dtype=some.sampled_from([torch.float32, torch.float64]),
    seed=some.integers(0, 10**6),
)
def test_the_largest_of_all_blocks(
    rows: int,
    columns: int,
    block: int,
    share: float,
    room: float,
    kinds: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Few kinds of numbers make many ties."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randint(-kinds, kinds + 1, (rows, columns), generator=generator).to(dtype)
    taken = (torch.rand(rows * columns, generator=generator) < share).nonzero().view(-1)
    # What is taken may be anything, and the largest of all.
    poison = [float("nan"), float("inf"), -float("inf"), 1e30]
    for i in taken.tolist():
        matrix.view(-1)[i] = poison[i % 4]
    count = round(room * (rows * columns - taken.numel()))
    sizes: list[int] = []

    def blocks(start: int, stop: int) -> Tensor:
        sizes.append(stop - start)
        return matrix[start:stop].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(growth, "_BLOCK", block)
        found = largest_in_blocks(blocks, (rows, columns), count, taken, NAME)
    assert found.dtype == torch.int64
    assert found.tolist() == brute_largest(matrix, count, set(taken.tolist()))
    assert sum(sizes) == rows
    assert max(sizes) == min(rows, max(1, block // columns))


def test_zeros_are_chosen_when_nothing_is_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "_BLOCK", 4)
    matrix = torch.zeros(4, 4)
    matrix[2, 1] = -0.0
    taken = torch.tensor([0, 3])
    found = largest_in_blocks(rows_of(matrix), (4, 4), 5, taken, NAME)
    assert found.tolist() == [1, 2, 4, 5, 6]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 7, 15])
@pytest.mark.parametrize("count", [0, 2])
def test_a_bad_entry_that_could_be_chosen_names_the_layer(
    bad: float, at: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth, "_BLOCK", 8)
    matrix = torch.ones(4, 4)
    matrix.view(-1)[at] = bad
    assert largest_in_blocks(rows_of(matrix), (4, 4), count, torch.tensor([at]), NAME).numel() == (
        count
    )
    with pytest.raises(ValueError, match=r"hidden\.weight.* NaN or infinite"):
        largest_in_blocks(rows_of(matrix), (4, 4), count, torch.tensor([(at + 1) % 16]), NAME)


@pytest.mark.parametrize("count", [-1, 15])
def test_more_than_there_are_names_the_layer(count: int) -> None:
    with pytest.raises(ValueError, match=rf"hidden\.weight.*k={count} of 14 scores"):
        largest_in_blocks(rows_of(torch.ones(4, 4)), (4, 4), count, torch.tensor([0, 3]), NAME)


def test_sums_that_overflow_are_no_error() -> None:
    matrix = torch.full((2, 2), 3e38)
    none = torch.empty(0, dtype=torch.int64)
    assert largest_in_blocks(rows_of(matrix), (2, 2), 2, none, NAME).tolist() == [0, 1]


# Exchanging connections.


@some.composite
def changes(draw: some.DrawFn) -> tuple[tuple[int, int], list[int], list[int], list[int], int]:
    """Shape, active weights, some of them dropped, and grown ones among the others and dropped."""
    shape = draw(some.integers(1, 5)), draw(some.integers(1, 6))
    numel = shape[0] * shape[1]
    active = sorted(draw(some.sets(some.integers(0, numel - 1), min_size=1)))
    dropped = draw(some.lists(some.sampled_from(active), unique=True))
    free = sorted(set(range(numel)) - set(active) | set(dropped))
    grown = draw(some.lists(some.sampled_from(free), unique=True)) if free else []
    return shape, active, dropped, grown, draw(some.integers(0, 1000))


@settings(max_examples=200)
@given(changes(), some.booleans(), some.sampled_from([0.0, 0.01]))
def test_an_exchange_does_to_values_what_it_does_to_a_dense_weight(
    change: tuple[tuple[int, int], list[int], list[int], list[int], int],
    with_values: bool,
    fresh: float,
) -> None:
    shape, active, dropped, grown, seed = change
    both = Pair(shape, active, seed)
    gradient = spread(both.targets[1], both.targets[1].param.grad)
    values = torch.arange(1.0, len(grown) + 1).double() if with_values else None
    index = [torch.tensor(i, dtype=torch.int64) for i in (dropped, grown)]
    (gone, new, *_), (gone_csr, new_csr, *_) = both.exchange(*index, values, fresh=fresh)
    assert sorted(gone.tolist()) == gone_csr.tolist() == sorted(set(dropped) - set(grown))
    assert sorted(new.tolist()) == new_csr.tolist() == sorted(set(grown) - set(active))
    both.check()
    csr = both.targets[1]
    left = csr.mask.clone()
    left.view(-1)[new_csr] = False
    assert torch.equal(spread(csr, csr.param.grad), torch.where(left, gradient, 0.0))
    moment = spread(csr, both.bases[1].state[csr.param]["exp_avg"]).view(-1)
    assert (moment[new_csr] == fresh).all()
    start = dense_weight(csr).view(-1)
    for i, wanted in zip(grown, range(1, len(grown) + 1), strict=True):
        if i in new_csr.tolist():
            assert start[i] == (wanted if with_values else 0)


@settings(max_examples=25)
@given(some.integers(0, 10**6))
def test_many_exchanges_one_after_the_other(seed: int) -> None:
    chance = random.Random(seed)
    both = Pair((6, 7), sorted(chance.sample(range(42), 15)), seed)
    for _ in range(6):
        active = both.targets[0].active_indices().tolist()
        dropped = chance.sample(active, chance.randint(0, len(active) - 1))
        free = sorted(set(range(42)) - set(active) | set(dropped))
        grown = chance.sample(free, chance.randint(0, len(free)))
        values = torch.randn(len(grown)).double() if chance.random() < 0.5 else None
        both.exchange(torch.tensor(dropped).long(), torch.tensor(grown).long(), values)
        both.check()
        x = torch.randn(3, 7).double()
        assert torch.allclose(both.targets[1].layer(x), x @ dense_weight(both.targets[0]).t())


@pytest.mark.parametrize("share", [0.001, 0.3, 1.0])
def test_exchanges_of_very_many(share: float) -> None:
    """There other algorithms may be worth it; places at both ends are among them."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(200_000, generator=generator)
    active = torch.cat([order[:60_000], torch.tensor([0, 199_999])]).unique()
    both = Pair((400, 500), active.tolist(), 0)
    both.check()
    dropped = active[torch.rand(active.numel(), generator=generator) < share]
    free = torch.ones(200_000, dtype=torch.bool)
    free[active] = False
    free[dropped] = True
    grown = free.nonzero().view(-1)
    grown = grown[torch.rand(grown.numel(), generator=generator) < 0.2]
    values = torch.randn(grown.numel(), generator=generator).double()
    (gone, new, *_), (gone_csr, new_csr, *_) = both.exchange(dropped, grown, values)
    assert torch.equal(gone, gone_csr) and torch.equal(new, new_csr)
    both.check()
    masked, csr = both.targets
    count = csr.active // 3
    dropped = csr.least_active(count)
    assert torch.equal(dropped, masked.least_active(count))
    assert torch.equal(csr.active_values(dropped), masked.active_values(dropped))
    scores = torch.randn(400, 500, generator=generator)
    found = csr.largest_free(scores, count, dropped)
    assert torch.equal(found, masked.largest_free(scores, count, dropped))


def test_the_parameter_stays_the_same_while_its_size_does() -> None:
    both = Pair((4, 5), [0, 3, 7, 9], 0)
    param, version = both.targets[1].param, both.targets[1].param._version
    both.exchange(torch.tensor([3]), torch.tensor([11]))
    assert both.targets[1].param is param and param._version > version
    both.exchange(torch.tensor([11]), torch.tensor([], dtype=torch.int64))
    assert both.targets[1].param is not param
    both.check()


@pytest.mark.parametrize("all_of_them", [True, False])
def test_to_nothing_but_new_ones_or_nothing_at_all(all_of_them: bool) -> None:
    both = Pair((3, 4), [1, 5], 0)
    none = torch.tensor([], dtype=torch.int64)
    both.exchange(torch.tensor([1, 5]), torch.arange(12) if all_of_them else none)
    both.check()
    assert both.targets[1].active == (12 if all_of_them else 0)
    both.targets[1].layer(torch.ones(2, 4).double()).sum().backward()
    both.exchange(none, none)
    both.check()


def test_growing_from_no_connection() -> None:
    both = Pair((3, 4), [1, 5], 0)
    both.exchange(torch.tensor([1, 5]), torch.tensor([], dtype=torch.int64))
    both.exchange(torch.tensor([], dtype=torch.int64), torch.tensor([11, 2]))
    both.check()
    assert both.targets[1].active_indices().tolist() == [2, 11]


@given(some.integers(0, 1000))
def test_a_whole_new_mask(seed: int) -> None:
    both = Pair((4, 6), random_mask((24,), 0.4, seed).nonzero().view(-1).tolist(), seed)
    mask = random_mask((4, 6), 0.4, seed + 1)
    counts = [target.replace_mask(mask) for target in both.targets]
    assert counts[0] == counts[1]
    assert torch.equal(both.targets[1].mask, mask)
    assert torch.equal(dense_weight(both.targets[0]), dense_weight(both.targets[1]))


def test_the_pattern_of_a_checkpoint_is_taken_as_an_exchange() -> None:
    both = Pair((4, 5), [0, 3, 7, 9], 0)
    csr = both.targets[1]
    before = dense_weight(csr).clone()
    pattern = Pattern.of(torch.tensor([3, 4, 7]), (4, 5))
    entry = {"row_pointers": pattern.pointers.long(), "columns": pattern.columns.long()}
    gone, new, *_ = csr.take_pattern(entry)
    assert (gone.tolist(), new.tolist()) == ([0, 9], [4])
    assert csr.layer.pattern == pattern
    assert dense_weight(csr).view(-1)[[3, 7]].equal(before.view(-1)[[3, 7]])
    assert csr.describe().keys() == {"row_pointers", "columns"}
    assert torch.equal(csr.describe()["columns"], pattern.columns)
