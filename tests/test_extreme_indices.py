"""Extremes among the active or the free entries, without a list of those entries."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor

from sparsetrain import _threshold, selection
from sparsetrain.selection import extreme_indices


def by_sorting(values: Tensor, mask: Tensor, k: int, among: bool, largest: bool) -> Tensor:
    """A stable sort of the list of eligible entries."""
    eligible = (mask == among).view(-1).nonzero().view(-1)
    size = values.view(-1)[eligible].abs().double()
    order = torch.sort(size, descending=largest, stable=True).indices[:k]
    return eligible[order].sort().values


def drawn(kind: str, number: int, density: float, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(number, generator=generator)
    if kind == "few values":
        values = values.round()
    if kind == "mostly zero":
        values[torch.rand(number, generator=generator) < 0.9] = 0.0
    return values, torch.rand(number, generator=generator) < density


@settings(max_examples=60)
@given(
    kind=some.sampled_from(["normal", "few values", "mostly zero"]),
    number=some.one_of(some.integers(1, 50), some.integers(_threshold.SMALL - 1, 40_000)),
    density=some.sampled_from([0.001, 0.02, 0.1, 0.5, 1.0]),
    share=some.floats(0, 1),
    among=some.booleans(),
    largest=some.booleans(),
    seed=some.integers(0, 10**6),
)
def test_equals_a_stable_sort_of_the_eligible(
    kind: str, number: int, density: float, share: float, among: bool, largest: bool, seed: int
) -> None:
    values, mask = drawn(kind, number, density, seed)
    k = int(share * int((mask == among).sum()))
    found = extreme_indices(values, mask, k, among=among, largest=largest)
    assert torch.equal(found, by_sorting(values, mask, k, among, largest))


@pytest.mark.parametrize("among", [True, False])
def test_one_pass_is_the_usual_way(among: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of eligible entries is not made, which is what the pass is for."""
    monkeypatch.setattr(selection, "_indices", None)
    values, mask = drawn("normal", 100_000, 0.3, seed=0)
    found = extreme_indices(values, mask, 3000, among=among, largest=not among)
    assert torch.equal(found, by_sorting(values, mask, 3000, among, not among))


def test_a_sample_that_misleads_costs_time_only() -> None:
    stride = max(100_000 // _threshold._SMALL_SAMPLE, 4) | 1
    values = torch.ones(100_000)
    values[::stride] = 100.0
    mask = torch.ones(100_000, dtype=torch.bool)
    for k in (values[::stride].numel() - 10, 60_000):
        found = extreme_indices(values, mask, k, among=True, largest=True)
        assert torch.equal(found, by_sorting(values, mask, k, True, True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("number", [100, 30_000])
def test_other_dtypes_and_layouts(dtype: torch.dtype, number: int) -> None:
    values, mask = drawn("normal", number, 0.2, seed=1)
    values = values.to(dtype).view(10, -1).t()
    mask = mask.view(-1, 10)
    found = extreme_indices(values, mask, number // 20, among=True, largest=False)
    expected = by_sorting(values.contiguous(), mask, number // 20, True, False)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("number", [100, 30_000])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_only_eligible_entries_have_to_be_finite(number: int, bad: float) -> None:
    values, mask = drawn("normal", number, 0.2, seed=2)
    where = int((~mask).nonzero()[0])
    values[where] = bad
    found = extreme_indices(values, mask, number // 20, among=True, largest=True)
    assert torch.equal(found, by_sorting(values, mask, number // 20, True, True))
    with pytest.raises(ValueError, match=r"layer 'fc': 1 of \d+ scores are NaN or infinite"):
        extreme_indices(values, mask, number // 20, among=False, largest=True, name="fc")


def test_a_count_out_of_range_is_refused() -> None:
    for number in (100, 30_000):
        values, mask = drawn("normal", number, 0.2, seed=3)
        active = int(mask.sum())
        with pytest.raises(ValueError, match=f"k={active + 1} of {active}"):
            extreme_indices(values, mask, active + 1, among=True, largest=True)
