from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor

from sparsetrain import _threshold, selection
from sparsetrain.selection import (
    bottom_k_indices,
    group_top_k,
    n_m_mask,
    select,
    top_k,
    top_k_across,
    top_k_indices,
)
from sparsetrain.structures import Block

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DTYPES = [*FLOATS, torch.uint8, torch.int32, torch.int64]
KINDS = ["normal", "few values", "constant", "mostly zero", "rising", "falling", "heavy tail"]

seeds = some.integers(0, 2**32 - 1)
# Either side of the size up to which everything is partitioned at once, and a second sample stride.
numbers = some.one_of(
    some.integers(1, 40),
    some.integers(_threshold.SMALL - 2, _threshold.SMALL + 2),
    some.integers(_threshold.SMALL, 60_000),
)


def draw_scores(kind: str, number: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    random = np.random.default_rng(seed)
    values = random.standard_normal(number)
    if kind == "few values":
        values = random.integers(-2, 3, number)
    elif kind == "constant":
        values = np.full(number, 0.25)
    elif kind == "mostly zero":
        values = np.where(random.random(number) < 0.9, 0, values)
    elif kind == "rising":
        values = np.sort(values)
    elif kind == "falling":
        values = -np.sort(values)
    elif kind == "heavy tail":
        values = values**5
    if not dtype.is_floating_point:
        values = np.abs(values * 20) % 100
    return torch.from_numpy(np.asarray(values, dtype=np.float64)).to(dtype)


def best(parts: list[Tensor], k: int, largest: bool = True) -> list[Tensor]:
    """The first k of a stable sort over all parts, as masks."""
    values = np.concatenate([part.double().numpy().reshape(-1) for part in parts])
    mask = torch.zeros(values.size, dtype=torch.bool)
    mask[np.argsort(-values if largest else values, kind="stable")[:k].copy()] = True
    pieces = mask.split([part.numel() for part in parts])
    return [piece.reshape(part.shape) for piece, part in zip(pieces, parts, strict=True)]


def check_best(scores: Tensor, k: int) -> None:
    mask = top_k(scores, k)
    assert mask.dtype == torch.bool and mask.shape == scores.shape and int(mask.sum()) == k
    assert torch.equal(mask, best([scores], k)[0])
    assert torch.equal(top_k_indices(scores, k), mask.reshape(-1).nonzero().squeeze(1))
    lowest = best([scores], k, largest=False)[0].reshape(-1).nonzero().squeeze(1)
    assert torch.equal(bottom_k_indices(scores, k), lowest)


@given(
    values=some.lists(some.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1),
    data=some.data(),
)
def test_any_few_scores(values: list[float], data: Any) -> None:
    for dtype in (torch.float32, torch.float64):
        scores = torch.tensor(values, dtype=dtype)
        check_best(scores, data.draw(some.integers(0, len(values))))


@settings(max_examples=80)
@given(
    kind=some.sampled_from(KINDS),
    number=numbers,
    dtype=some.sampled_from(DTYPES),
    seed=seeds,
    share=some.floats(0, 1),
)
def test_scores_of_any_kind_size_and_dtype(
    kind: str, number: int, dtype: torch.dtype, seed: int, share: float
) -> None:
    check_best(draw_scores(kind, number, seed, dtype), round(share * number))


@pytest.mark.parametrize("kind", KINDS)
def test_large_tensors_in_several_chunks(kind: str) -> None:
    number = 2 * _threshold._CHUNK + 1000
    assert number > 7 * _threshold._SAMPLE  # so the stride of the sample is no longer the least
    scores = draw_scores(kind, number, seed=0)
    for k in (1, number // 50, number // 2 + 1, number - 1):
        assert torch.equal(top_k(scores, k), best([scores], k)[0])


NUMBER = 20_000


def hide_from_sample(change: Callable[[Tensor], Tensor]) -> Tensor:
    """Scores around 0, changed where the sample looks, which is at every fifth."""
    scores = draw_scores("normal", NUMBER, seed=1)
    scores[::5] = change(scores[::5])
    return scores


def edges(scores: Tensor, value: float) -> list[int]:
    """Counts at which the first and the last score equal to `value` is selected, and beside."""
    above, at_least = int((scores > value).sum()), int((scores >= value).sum())
    return [k for end in (above, at_least) for k in (end - 1, end, end + 1) if 0 <= k <= NUMBER]


@pytest.mark.parametrize("offset", [-10.0, -0.5, 0.0, 0.5, 10.0])
def test_brackets_that_miss(offset: float) -> None:
    """Too high, inside and too low, with and without ties at the ends of the bracket."""
    for factor in (1.0, 1e-3, 0.0):
        scores = hide_from_sample(lambda x, factor=factor: factor * x + offset)
        for k in (1, 500, NUMBER // 5, NUMBER // 2, 4 * NUMBER // 5, NUMBER - 500, NUMBER):
            check_best(scores, k)
            check_best(scores.round(), k)
        for k in edges(scores, offset):
            check_best(scores, k)


@pytest.mark.parametrize("zeros", [0.5, 0.9, 0.999])
def test_counts_that_end_where_ties_begin_or_end(zeros: float) -> None:
    scores = draw_scores("normal", NUMBER, seed=2)
    scores[draw_scores("normal", NUMBER, seed=3).argsort() < zeros * NUMBER] = 0
    for k in edges(scores, 0.0):
        check_best(scores, k)


def test_only_a_missed_bracket_is_searched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    threshold = _threshold._threshold
    monkeypatch.setattr(
        _threshold, "_threshold", lambda parts, k, up: calls.append(k) or threshold(parts, k, up)
    )
    for offset, again in [(-10, True), (0, False), (10, True)]:
        calls.clear()
        top_k(hide_from_sample(lambda x, offset=offset: x + offset), NUMBER // 2)
        assert (len(calls) > 1) == again


def test_zeros_and_denormals() -> None:
    scores = torch.tensor([-0.0, 0.0, -1e-45, 1e-45, -0.0, 0.0])
    assert [top_k_indices(scores, k).tolist() for k in (1, 2, 3, 5)] == [
        [3], [0, 3], [0, 1, 3], [0, 1, 3, 4, 5],
    ]  # fmt: skip
    assert bottom_k_indices(scores, 2).tolist() == [0, 2]


def test_memory_layout_gradients_and_empty_tensors() -> None:
    scores = torch.arange(24.0).reshape(1, 4, 2, 3).to(memory_format=torch.channels_last)
    check_best(scores, 7)
    check_best(scores.transpose(1, 3)[..., ::2], 5)
    assert top_k(scores.requires_grad_(), 5).sum() == 5
    assert top_k(torch.empty(0, 3), 0).shape == (0, 3)
    assert top_k(torch.tensor(3.0), 1).equal(torch.tensor(True))
    assert top_k_across({}, 0) == {}


def test_scores_whose_sum_overflows_are_finite_scores() -> None:
    check_best(torch.full((8,), 3e38), 3)
    check_best(torch.tensor([6e4, 6e4, -6e4], dtype=torch.float16), 1)


@settings(max_examples=60)
@given(
    parts=some.lists(
        some.tuples(some.sampled_from(KINDS), some.one_of(some.just(0), numbers)),
        min_size=1,
        max_size=4,
    ),
    dtype=some.sampled_from(DTYPES),
    seed=seeds,
    share=some.floats(0, 1),
    minimum=some.integers(0, 50),
)
def test_across_layers(
    parts: list[tuple[str, int]], dtype: torch.dtype, seed: int, share: float, minimum: int
) -> None:
    """As a sort of what is left once every layer has its minimum."""
    scores = {
        f"layer{i}": draw_scores(kind, number, seed + i, dtype) * (i + 1)
        for i, (kind, number) in enumerate(parts)
    }
    layers = list(scores.values())
    floors = [min(minimum, layer.numel()) for layer in layers]
    k = max(sum(floors), round(share * sum(layer.numel() for layer in layers)))
    masks = top_k_across(scores, k, minimum)
    assert list(masks) == list(scores)

    safe = [best([layer], floor)[0] for layer, floor in zip(layers, floors, strict=True)]
    rest = [layer[~mask] for layer, mask in zip(layers, safe, strict=True)]
    for mask, more in zip(safe, best(rest, k - sum(floors)), strict=True):
        mask[~mask] = more
    assert all(torch.equal(a, b) for a, b in zip(masks.values(), safe, strict=True))


def test_ties_go_to_the_earlier_layer() -> None:
    scores = {"b": torch.ones(3), "a": torch.ones(2, dtype=torch.float64), "c": torch.ones(3)}
    masks = top_k_across(scores, 5)
    assert {name: mask.tolist() for name, mask in masks.items()} == {
        "b": [True, True, True],
        "a": [True, False],
        "c": [True, False, False],
    }


@given(
    groups=some.integers(1, 30),
    size=some.integers(1, 20),
    kind=some.sampled_from(KINDS),
    dtype=some.sampled_from(DTYPES),
    seed=seeds,
    data=some.data(),
)
def test_groups(
    groups: int, size: int, kind: str, dtype: torch.dtype, seed: int, data: Any
) -> None:
    k = data.draw(some.integers(0, size))
    units = draw_scores(kind, groups * size, seed, dtype).reshape(groups, size)
    expected = torch.stack([best([row], k)[0] for row in units])
    assert torch.equal(group_top_k(units, k), expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", FLOATS)
def test_scores_that_are_not_finite_name_the_layer(bad: float, dtype: torch.dtype) -> None:
    scores = torch.ones(4, 8, dtype=dtype)
    scores[1, 2] = bad
    calls: list[Callable[[], object]] = [
        lambda: top_k(scores, 3, name="fc1"),
        lambda: top_k(scores, 0, name="fc1"),
        lambda: top_k_indices(scores, 3, name="fc1"),
        lambda: bottom_k_indices(scores, 3, name="fc1"),
        lambda: top_k_across({"fc0": torch.ones(3), "fc1": scores}, 5),
        lambda: group_top_k(scores, 3, name="fc1"),
        lambda: n_m_mask(scores, 2, 4, name="fc1"),
        lambda: select(scores, 8, Block(size=(2, 2)), name="fc1"),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"'fc1': 1 of .* scores are NaN or infinite"):
            call()


def test_counts_out_of_range() -> None:
    scores = torch.ones(4, 6)
    for k in (-1, 25):
        for function in (top_k, top_k_indices, bottom_k_indices, select):
            with pytest.raises(ValueError, match=f"layer 'fc1': cannot select k={k} of 24"):
                function(scores, k, name="fc1")
    with pytest.raises(ValueError, match="cannot select k=7 of 6"):
        group_top_k(scores, 7)
    with pytest.raises(ValueError, match="k=3 cannot leave at least 2 in each of 2 layers"):
        top_k_across({"a": scores, "b": scores}, 3, minimum=2)
    with pytest.raises(ValueError, match="cannot select k=49 of 48"):
        top_k_across({"a": scores, "b": scores}, 49)
    with pytest.raises(ValueError, match=r"complex scores .* take their absolute value"):
        top_k(scores.cfloat(), 1)


@settings(max_examples=30)
@given(kind=some.sampled_from(KINDS), number=some.integers(1, 300), seed=seeds, data=some.data())
def test_the_way_of_other_devices_agrees(kind: str, number: int, seed: int, data: Any) -> None:
    """What runs on a GPU, run on the CPU."""
    parts = [draw_scores(kind, number, seed + i) for i in range(3)]
    k = data.draw(some.integers(1, 3 * number))
    for largest in (True, False):
        masks = selection._best_on_device(parts, k, largest)
        assert all(map(torch.equal, masks, best(parts, k, largest)))


@pytest.mark.parametrize("largest", [True, False])
def test_two_threads_select_what_one_does(largest: bool) -> None:
    scores = torch.randint(0, 10**5, (1 << 20,), generator=torch.Generator().manual_seed(0)).float()
    choose = top_k_indices if largest else bottom_k_indices
    one = choose(scores, 30_000)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        two = choose(scores, 30_000)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, two)
    order = torch.sort(scores, descending=largest, stable=True).indices[:30_000]
    assert torch.equal(one, order.sort().values)
