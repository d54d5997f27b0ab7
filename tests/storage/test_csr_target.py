"""What policies ask of a weight held by its non-zeros, against the same weight held densely."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from sparse_twins import dense_weight, pair, random_mask, spread
from torch import Tensor, nn

from sparsetrain.base_state import carry_state
from sparsetrain.storage.csr import growth
from sparsetrain.storage.csr.growth import largest_in_blocks
from sparsetrain.storage.csr.layers import SparseLinear
from sparsetrain.storage.csr.pattern import Pattern
from sparsetrain.storage.csr.product import Tape
from sparsetrain.storage.csr.target import CsrTarget
from sparsetrain.storage.masked import MaskedTarget

NAME = "hidden.weight"


def brute_largest(matrix: Tensor, count: int, taken: set[int]) -> list[int]:
    """By a full sort: the largest first, of equal ones the lower index."""
    flat = matrix.abs().view(-1).tolist()
    free = [i for i in range(len(flat)) if i not in taken]
    return sorted(sorted(free, key=lambda i: (-flat[i], i))[:count])


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


class Pair:
    """One weight held both ways, with gradient and optimizer state at its active places."""

    def __init__(self, shape: tuple[int, int], active: list[int], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        mask = torch.zeros(shape, dtype=torch.bool)
        mask.view(-1)[active] = True
        dense = nn.Linear(shape[1], shape[0], bias=False, dtype=torch.float64)
        with torch.no_grad():
            dense.weight.copy_(torch.randn(shape, generator=generator))
        dense, sparse = pair(dense, mask)
        masked = MaskedTarget(NAME, dense.weight)
        masked.replace_mask(mask)
        self.targets: list[Any] = [masked, CsrTarget(NAME, sparse)]
        self.bases = [torch.optim.Adam([t.param]) for t in self.targets]
        state, gradient = (torch.randn(shape, generator=generator).double() for _ in range(2))
        for base, target in zip(self.bases, self.targets, strict=True):
            here = mask.view(-1).nonzero().view(-1)
            by_weight = [torch.where(mask, t, 0.0) for t in (state, gradient)]
            if isinstance(target, CsrTarget):
                by_weight = [t.view(-1)[here] for t in by_weight]
            base.state[target.param] = {
                "exp_avg": by_weight[0].clone(),
                "step": torch.tensor(3.0),
                "note": "kept",
            }
            target.param.grad = by_weight[1].clone()

    def exchange(self, *args: Any, fresh: float = 0.0) -> list[tuple[Tensor, Tensor]]:
        return [
            carry_state(base, target, lambda t=target: t.exchange(*args), {"exp_avg": fresh})
            for base, target in zip(self.bases, self.targets, strict=True)
        ]

    def check(self) -> None:
        masked, csr = self.targets
        assert torch.equal(masked.mask, csr.mask)
        assert masked.active == csr.active == csr.param.numel()
        assert torch.equal(masked.active_indices(), csr.active_indices())
        assert torch.equal(dense_weight(masked), dense_weight(csr))
        assert csr.param is csr.layer.values and csr.param.requires_grad
        held, values = (base.param_groups[0]["params"] for base in self.bases)
        assert held == [masked.param] and values[0] is csr.param and len(values) == 1
        states = [base.state[t.param] for base, t in zip(self.bases, self.targets, strict=True)]
        assert all(len(base.state) == 1 for base in self.bases)
        assert torch.equal(states[0]["exp_avg"], spread(csr, states[1]["exp_avg"]))
        assert states[1]["step"] == 3.0 and states[1]["note"] == "kept"


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
    (gone, new), (gone_csr, new_csr) = both.exchange(*index, values, fresh=fresh)
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
    (gone, new), (gone_csr, new_csr) = both.exchange(dropped, grown, values)
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
    gone, new = csr.take_pattern(entry)
    assert (gone.tolist(), new.tolist()) == ([0, 9], [4])
    assert csr.layer.pattern == pattern
    assert dense_weight(csr).view(-1)[[3, 7]].equal(before.view(-1)[[3, 7]])
    assert csr.describe().keys() == {"row_pointers", "columns"}
    assert torch.equal(csr.describe()["columns"], pattern.columns)


# What policies look at.


@settings(max_examples=60)
@given(seed=some.integers(0, 10**6), kinds=some.sampled_from([1, 3, 1000]))
def test_the_least_active_and_the_largest_free(seed: int, kinds: int) -> None:
    """With ties among the weights and among the scores."""
    generator = torch.Generator().manual_seed(seed)
    both = Pair((5, 7), random_mask((35,), 0.5, seed).nonzero().view(-1).tolist(), seed)
    masked, csr = both.targets
    weight = torch.randint(-kinds, kinds + 1, (5, 7), generator=generator).double()
    with torch.no_grad():
        masked.param.copy_(torch.where(masked.mask, weight, 0.0))
        csr.param.copy_(weight.view(-1)[csr.active_indices()])
    scores = torch.randint(-kinds, kinds + 1, (5, 7), generator=generator).double()
    assert csr.shape == masked.shape and csr.numel == masked.numel
    assert csr.density == masked.density
    for count in {0, 1, masked.active // 2, masked.active}:
        dropped = masked.least_active(count)
        assert torch.equal(csr.least_active(count), dropped)
        assert torch.equal(csr.active_values(dropped), masked.active_values(dropped))
        room = masked.numel - masked.active + count
        for many in {0, room // 2, room}:
            grown = masked.largest_free(scores, many, dropped)
            assert torch.equal(csr.largest_free(scores, many, dropped), grown)
    assert torch.equal(csr.at_active(csr.param.detach()), masked.at_active(masked.param.detach()))


def test_bad_weights_and_scores_name_the_layer() -> None:
    csr = Pair((4, 5), [0, 3, 7, 9], 0).targets[1]
    none = torch.tensor([], dtype=torch.int64)
    scores = torch.ones(4, 5).double()
    scores[0, 0] = float("nan")
    assert csr.largest_free(scores, 2, none).numel() == 2
    scores[0, 1] = float("nan")
    with pytest.raises(ValueError, match=r"hidden\.weight"):
        csr.largest_free(scores, 2, none)
    with pytest.raises(ValueError, match=r"hidden\.weight"):
        csr.least_active(5)
    with torch.no_grad():
        csr.param[1] = float("nan")
    with pytest.raises(ValueError, match=r"hidden\.weight"):
        csr.least_active(2)


def test_what_it_says_of_itself() -> None:
    layer = SparseLinear(10, 8, 0.1)
    target = CsrTarget(NAME, layer)
    assert (target.storage, target.holds_zeros, target.built) == ("csr", False, False)
    assert (target.active, target.numel, target.shape, target.density) == (8, 80, (8, 10), 0.1)
    assert int(target.mask.sum()) == 8 and target.mask.shape == (8, 10)
    assert CsrTarget(NAME, layer, built=True).built
    before = layer.weight
    target.before_step(), target.after_step(True), target.mask_weight(), target.mask_gradient()
    target.check_outside_writes(), target.conceal(), target.check_gradient()
    assert torch.equal(layer.weight, before)


# The dense gradient, which never is one tensor.


def dense_gradient(passes: list[tuple[Tensor, Tensor]]) -> Tensor:
    return sum((grad.t() @ x for x, grad in passes), torch.zeros(8, 10).double())


class Watched:
    """A sparse layer whose dense gradient is wanted, and the passes that went through it."""

    def __init__(self, density: float = 0.2) -> None:
        generator = torch.Generator().manual_seed(1)
        self.layer = SparseLinear(10, 8, density, dtype=torch.float64, generator=generator)
        self.target = CsrTarget(NAME, self.layer)
        self.target.watch_gradient(True)
        self.passes: list[tuple[Tensor, Tensor]] = []

    def run(self, seed: int, batch: int = 4) -> None:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(batch, 10, generator=generator).double()
        grad = torch.randn(batch, 8, generator=generator).double()
        self.layer(x).backward(grad)
        self.passes.append((x, grad))

    def zero(self, set_to_none: bool) -> None:
        self.layer.zero_grad(set_to_none=set_to_none)
        self.passes.clear()

    def agrees(self) -> bool:
        found = self.target.whole_gradient()
        assert found is not None and found.shape == (8, 10)
        wanted = dense_gradient(self.passes)
        at = self.target.active_indices()
        assert torch.allclose(self.layer.values.grad, wanted.view(-1)[at])
        return torch.allclose(found, wanted)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_it_is_the_sum_over_the_passes_since_zero_grad(set_to_none: bool) -> None:
    watched = Watched()
    assert not watched.target.has_gradient and watched.target.whole_gradient() is None
    for seeds in ((0,), (1, 2, 3), (4, 5)):
        watched.zero(set_to_none)
        for seed in seeds:
            watched.run(seed)
        assert watched.target.has_gradient and watched.agrees()


def test_the_steepest_are_the_largest_of_the_dense_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watched = Watched()
    for seed in range(3):
        watched.run(seed)
    gradient, target = dense_gradient(watched.passes), watched.target
    freed = target.active_indices()[::3].contiguous()
    kept = set(target.active_indices().tolist()) - set(freed.tolist())
    for block in (1, 25, 10**6):
        monkeypatch.setattr(growth, "_BLOCK", block)
        for count in (0, 1, 9, 80 - len(kept)):
            found = target.steepest_free(count, freed)
            assert found.tolist() == brute_largest(gradient, count, kept)


def test_several_calls_in_one_pass_belong_together() -> None:
    for set_to_none in (True, False):
        watched = Watched()
        for _ in range(2):
            watched.zero(set_to_none)
            x = torch.randn(3, 10).double()
            outs = [watched.layer(factor * x) for factor in (1, 2, 3)]
            sum(out.square().sum() for out in outs).backward()
            for factor, out in zip((1, 2, 3), outs, strict=True):
                watched.passes.append((factor * x, 2 * out.detach()))
            assert watched.agrees()


def test_a_pass_that_leaves_the_active_weights_without_gradient_counts_too() -> None:
    """Its zeros in the values' gradient are not those of `zero_grad`."""
    watched = Watched(0.05)
    columns = watched.layer.pattern.columns.unique().tolist()
    x = torch.ones(3, 10).double()
    x[:, columns] = 0.0
    grad = torch.ones(3, 8).double()
    watched.layer(x).backward(grad)
    watched.passes.append((x, grad))
    assert not watched.layer.values.grad.any()
    watched.run(1)
    assert watched.agrees()


def test_gradients_that_are_taken_aside_do_not_count() -> None:
    """Of the input alone, as for adversarial examples or a look at saliency."""
    watched = Watched()
    watched.run(0)
    x = torch.ones(2, 10, dtype=torch.float64, requires_grad=True)
    torch.autograd.grad(watched.layer(x).square().sum(), x)
    assert watched.agrees()
    watched.run(1)
    torch.autograd.grad(watched.layer(x).square().sum(), x)
    assert watched.agrees()


def test_inputs_may_be_overwritten_once_the_pass_is_over() -> None:
    """One buffer for all micro-batches, of one sample or turned, of which no copy is needed."""
    for make in (lambda: torch.zeros(1, 10), lambda: torch.zeros(10, 3).t()):
        watched = Watched()
        buffer = make().double()
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            buffer.copy_(torch.randn(buffer.shape, generator=generator))
            grad = torch.randn(buffer.shape[0], 8, generator=generator).double()
            watched.layer(buffer).backward(grad)
            watched.passes.append((buffer.clone(), grad.clone()))
            grad.zero_()
        buffer.zero_()
        assert watched.agrees()


def test_a_layer_that_the_last_pass_did_not_reach() -> None:
    """With gradients set to zero and not to None its gradient is 0, as that of a dense weight."""
    watched = Watched()
    watched.run(0)
    watched.zero(set_to_none=False)
    gradient = watched.target.whole_gradient()
    assert gradient is None or not gradient.any()
    fresh = Watched()
    fresh.layer.values.grad = torch.zeros_like(fresh.layer.values)
    none = torch.tensor([], dtype=torch.int64)
    free = [i for i in range(80) if i not in set(fresh.target.active_indices().tolist())]
    assert fresh.target.steepest_free(3, none).tolist() == free[:3]


def test_without_watching_an_update_says_what_to_do() -> None:
    watched = Watched()
    watched.target.watch_gradient(False)
    assert watched.layer.tape is None
    watched.run(0)
    for ask in (
        watched.target.whole_gradient,
        lambda: watched.target.steepest_free(1, torch.tensor([], dtype=torch.int64)),
    ):
        with pytest.raises(ValueError, match=r"hidden\.weight.*optimizer\.expect_update\(\)"):
            ask()


def test_watching_twice_forgets_nothing_and_release_ends_it() -> None:
    watched = Watched()
    watched.run(0)
    watched.target.watch_gradient(True)
    assert watched.agrees()
    again = copy.deepcopy(watched.target)
    assert again.layer.values.grad is None  # as torch copies parameters
    assert isinstance(again.layer.tape, Tape) and again.layer.tape is not watched.layer.tape
    watched.target.release()
    assert watched.layer.tape is None


def test_a_gradient_that_accumulates_does_not_keep_passes_of_cleared_ones() -> None:
    watched = Watched()
    for seed in range(5):
        watched.zero(set_to_none=seed % 2 == 0)
        watched.run(seed)
        assert watched.layer.tape is not None and len(watched.layer.tape.factors) == 1
