from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor

from sparsetrain.selection import top_k
from sparsetrain.sharded_selection import SumCounts, radix_threshold, top_k_shards

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
TINY = 2.0**-149  # the least denormal of float32
EDGES = [0.0, -0.0, TINY, -TINY, 2 * TINY, 1.0, -1.0, 1.0 + 2.0**-23, 3e38, -3e38]

scores = some.one_of(
    some.sampled_from(EDGES), some.floats(-4, 4, width=32), some.integers(-2, 2).map(float)
)
splits = some.lists(some.lists(scores, max_size=12), min_size=1, max_size=6)


class Ranks:
    """Threads that stand in for processes; `sum_counts` adds over all of them."""

    def __init__(self, world: int) -> None:
        self.sent: list[list[Tensor]] = [[] for _ in range(world)]
        self.left = [False] * world
        self.changed = threading.Condition()

    def run(self, work: Callable[[int, SumCounts], Any]) -> list[Any]:
        """What `work(rank, sum_counts)` returns or raises on each rank."""
        with ThreadPoolExecutor(len(self.sent)) as pool:
            waiting = [pool.submit(self._on, rank, work) for rank in range(len(self.sent))]
            return [job.exception() or job.result() for job in waiting]

    def _on(self, rank: int, work: Callable[[int, SumCounts], Any]) -> Any:
        try:
            return work(rank, lambda counts: self._sum(rank, counts))
        finally:
            with self.changed:
                self.left[rank] = True
                self.changed.notify_all()

    def _sum(self, rank: int, counts: Tensor) -> Tensor:
        assert (
            counts.dtype in (torch.int32, torch.int64, torch.float64)
            and counts.device.type == "cpu"
        )
        with self.changed:
            self.sent[rank].append(counts)
            self.changed.notify_all()
            turn = len(self.sent[rank])
            while any(len(sent) < turn for sent in self.sent):
                assert not any(self.left), "a rank left while others wait for its counts"
                self.changed.wait()
            return torch.stack([sent[turn - 1] for sent in self.sent]).sum(0)


def select_on_ranks(ranks: list[list[Tensor]], k: int, name: str = "") -> list[Any]:
    """`top_k_shards` on every rank, each with its own shards: masks or an error for each."""
    first = [sum(len(held) for held in ranks[:rank]) for rank in range(len(ranks))]
    total = sum(len(held) for held in ranks)

    def work(rank: int, sum_counts: SumCounts) -> list[Tensor]:
        places = range(first[rank], first[rank] + len(ranks[rank]))
        return top_k_shards(
            ranks[rank], k, sum_counts, shards=places, total_shards=total, name=name
        )

    return Ranks(len(ranks)).run(work)


def check_ranks(ranks: list[list[Tensor]], k: int) -> None:
    results = select_on_ranks(ranks, k)
    assert not [result for result in results if isinstance(result, BaseException)]
    masks = [mask for result in results for mask in result]
    shards = [shard for held in ranks for shard in held]
    assert torch.equal(joined(masks), top_k(joined(shards), k))


def joined(shards: list[Tensor]) -> Tensor:
    return torch.cat([shard.reshape(-1) for shard in shards])


@settings(max_examples=200)
@given(split=splits, dtype=some.sampled_from([torch.float32, torch.float64]), data=some.data())
def test_shards_in_one_process(split: list[list[float]], dtype: torch.dtype, data: Any) -> None:
    shards = [torch.tensor(values, dtype=dtype) for values in split]
    k = data.draw(some.integers(0, joined(shards).numel()))
    assert torch.equal(joined(top_k_shards(shards, k)), top_k(joined(shards), k))
    if k:
        descending = joined(shards).sort(descending=True).values
        assert radix_threshold(shards, k) == descending[k - 1]


def test_zeros_of_either_sign_tie() -> None:
    shards = [torch.tensor([-0.0, -TINY]), torch.tensor([0.0, TINY, -0.0])]
    for k, expected in [(1, [3]), (2, [0, 3]), (3, [0, 2, 3]), (4, [0, 2, 3, 4])]:
        assert joined(top_k_shards(shards, k)).nonzero().squeeze(1).tolist() == expected


@settings(max_examples=60)
@given(split=splits, world=some.integers(1, 3), dtype=some.sampled_from(FLOATS), data=some.data())
def test_shards_on_several_ranks(
    split: list[list[float]], world: int, dtype: torch.dtype, data: Any
) -> None:
    """Also ranks whose shards are all empty, and ranks that hold none."""
    shards = [torch.tensor(values).clamp(-6e4, 6e4).to(dtype) for values in split]
    cuts = sorted(data.draw(some.integers(0, len(shards))) for _ in range(world - 1))
    ranks = [shards[a:b] for a, b in zip([0, *cuts], [*cuts, len(shards)], strict=True)]
    check_ranks(ranks, data.draw(some.integers(0, joined(shards).numel())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_digits_beyond_float32_and_spread_magnitudes(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5_000, dtype=dtype, generator=generator)
    values *= 10.0 ** torch.randint(-30, 30, values.shape, generator=generator)
    near = 1 + torch.arange(200, dtype=dtype).repeat(2) * torch.finfo(dtype).eps
    shards = [values[:17].reshape(1, 17), near, values[17:].reshape(-1, 3, 1)]
    for k in (1, 40, 400, 2_700, 5_399):
        masks = top_k_shards(shards, k)
        assert [mask.shape for mask in masks] == [shard.shape for shard in shards]
        assert torch.equal(joined(masks), top_k(joined(shards), k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_many_scores_of_which_samples_say_what_to_leave_out(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(50_000, generator=generator).to(dtype)
    uneven = [[values[:30_000], values[:0]], [], [values[30_000:]]]
    apart = [[values[:25_000] - 50], [values[25_000:] + 50]]  # samples of ranks differ
    misled = values.clone()
    misled[1::2] = 9.0  # what a sample with an even stride would not see
    for ranks in (uneven, apart, [[misled[:20_000]], [misled[20_000:]]]):
        numel = sum(shard.numel() for held in ranks for shard in held)
        for k in (0, 1, 700, 24_999, 25_001, 49_990, numel):
            check_ranks(ranks, k)


def test_a_wrong_guess_costs_time_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(30_000, generator=torch.Generator().manual_seed(0))
    for guess in (-10.0, 1.0, 10.0):
        monkeypatch.setattr("sparsetrain.sharded_selection._guess", lambda *_, g=guess: g)
        check_ranks([[values[:10_000]], [values[10_000:]]], 9_000)


def test_a_rank_without_shards_takes_part() -> None:
    shard = torch.tensor([1.0, 3.0, 2.0])
    for ranks in ([[shard], []], [[], [shard]], [[shard], [], [shard]]):
        check_ranks(ranks, 2)


def test_ranks_of_mixed_dtypes_agree_on_float64() -> None:
    ranks = [[torch.tensor([1.0])], [torch.tensor([1.0 + 1e-12], dtype=torch.float64)]]
    assert select_on_ranks(ranks, 1) == [[torch.tensor([False])], [torch.tensor([True])]]
    integers = [[torch.tensor([3, 5])], [torch.tensor([4], dtype=torch.int32)]]
    assert [masks[0].tolist() for masks in select_on_ranks(integers, 1)] == [[False, True], [False]]


@pytest.mark.parametrize("dtype, passes", [(torch.float32, 4), (torch.float64, 8)])
def test_only_small_histograms_are_sent(dtype: torch.dtype, passes: int) -> None:
    sent: list[int] = []

    def sum_counts(counts: Tensor) -> Tensor:
        sent.append(counts.numel())
        return counts

    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0)).to(dtype)
    top_k_shards([values], 100, sum_counts)
    assert len(sent) == 1 + passes + 1 and max(sent) == 256


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_score_is_an_error_on_every_rank(bad: float) -> None:
    ranks = [[torch.tensor([1.0, 2.0])], [torch.tensor([3.0, bad])]]
    for error in select_on_ranks(ranks, 1, name="fc1"):
        assert isinstance(error, ValueError)
        assert "layer 'fc1': 1 of 4 scores are NaN or infinite" in str(error)


def test_a_count_out_of_range_is_an_error_on_every_rank() -> None:
    ranks = [[torch.ones(2)], [torch.ones(3)]]
    for k in (-1, 6):
        for error in select_on_ranks(ranks, k, name="fc1"):
            assert isinstance(error, ValueError)
            assert f"layer 'fc1': cannot select k={k} of 5" in str(error)
    for masks in select_on_ranks(ranks, 5):
        assert all(mask.all() for mask in masks)


def test_bad_arguments() -> None:
    shards = [torch.ones(2), torch.ones(2)]
    with pytest.raises(ValueError, match="are not the places of 2 shards among 2"):
        top_k_shards(shards, 1, shards=[1, 2], total_shards=2)
    with pytest.raises(ValueError, match="not the places"):
        top_k_shards(shards, 1, shards=[-1, 0])
    with pytest.raises(ValueError, match="'fc1': the threshold of k=0 scores is not defined"):
        radix_threshold(shards, 0, name="fc1")
    with pytest.raises(ValueError, match="cannot select k=5 of 4"):
        radix_threshold(shards, 5)


def test_complex_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="complex"):
        top_k_shards([torch.ones(2, dtype=torch.complex64)], 1)
