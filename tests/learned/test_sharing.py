"""Which weights share a gate, against the number of each weight's gate found by a loop."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from learned_twins import gate_numbers, numbers
from torch import Tensor

from sparsetrain.learned.sharing import Sharing, share
from sparsetrain.structures import Block


@some.composite
def shared(draw: Any) -> tuple[Sharing, Tensor]:
    """How the weights of a small layer share gates, and the number of each weight's gate."""
    shape = tuple(draw(some.lists(some.integers(1, 4), min_size=2, max_size=5)))
    transposed = draw(some.booleans())
    per = draw(some.sampled_from(["weight", "input", "output", "block"]))
    if per != "block":
        return share(per, shape, transposed=transposed), gate_numbers(per, shape, transposed)
    columns = math.prod(shape[1:])
    rows = draw(some.sampled_from([n for n in range(1, 5) if shape[0] % n == 0]))
    size = (rows, draw(some.sampled_from([n for n in range(1, columns + 1) if columns % n == 0])))
    return share(Block(size=size), shape), gate_numbers(size, shape, False)


@given(shared())
def test_spread_gives_each_weight_its_gate(case: tuple[Sharing, Tensor]) -> None:
    sharing, number = case
    gates = numbers(0, *sharing.gates)
    assert gates.numel() == number.max() + 1
    assert torch.equal(sharing.spread(gates), gates.flatten()[number])


@given(shared())
def test_gather_sums_over_the_weights_of_each_gate(case: tuple[Sharing, Tensor]) -> None:
    sharing, number = case
    weight = numbers(1, *sharing.shape)
    sums = torch.zeros(math.prod(sharing.gates), dtype=torch.float64)
    sums.index_add_(0, number.flatten(), weight.flatten())
    assert sharing.gather(weight).shape == sharing.gates
    torch.testing.assert_close(sharing.gather(weight).flatten(), sums)


@given(shared())
def test_spread_and_gather_are_adjoint(case: tuple[Sharing, Tensor]) -> None:
    sharing, _ = case
    gates, weight = numbers(0, *sharing.gates), numbers(1, *sharing.shape)
    left = (sharing.spread(gates) * weight).sum()
    torch.testing.assert_close(left, (gates * sharing.gather(weight)).sum())


@settings(max_examples=50)
@given(shared())
def test_the_gradient_of_times_is_gathered(case: tuple[Sharing, Tensor]) -> None:
    sharing, number = case
    gates = numbers(0, *sharing.gates).requires_grad_()
    weight, slope = numbers(1, *sharing.shape).requires_grad_(), numbers(2, *sharing.shape)
    product = sharing.times(weight, gates)
    assert torch.equal(product, weight * gates.flatten()[number])
    of_gates, of_weight = torch.autograd.grad(product, [gates, weight], slope)
    torch.testing.assert_close(of_gates, sharing.gather(slope * weight.detach()))
    torch.testing.assert_close(of_weight, slope * sharing.spread(gates.detach()))


@given(shared())
def test_the_size_is_the_number_of_weights_of_every_gate(case: tuple[Sharing, Tensor]) -> None:
    sharing, number = case
    assert set(torch.bincount(number.flatten()).tolist()) == {sharing.size}
    assert not sharing.is_single or sharing.size == 1


def test_blocks_of_one_weight() -> None:
    sharing = share(Block(size=(1, 1)), (2, 3, 1))
    gates, weight = numbers(0, *sharing.gates), numbers(1, 2, 3, 1)
    assert torch.equal(sharing.times(weight, gates), weight * gates.view(2, 3, 1))
    assert torch.equal(sharing.gather(weight), weight.view(sharing.gates))


@pytest.mark.parametrize("per", ["weight", "input", "output", Block(size=(2, 9))])
def test_the_memory_format_changes_nothing(per: Any) -> None:
    sharing = share(per, (4, 6, 3, 3))
    gates, weight = numbers(0, *sharing.gates), numbers(1, 4, 6, 3, 3)
    turned = weight.to(memory_format=torch.channels_last)
    assert torch.equal(sharing.times(turned, gates), sharing.times(weight, gates))
    torch.testing.assert_close(sharing.gather(turned), sharing.gather(weight))
