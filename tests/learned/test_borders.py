"""Which side of its border a gate is on, and how it is put on the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from learned_twins import numbers
from torch import Tensor

from sparsetrain.learned import LearnedMask
from sparsetrain.learned.gumbel_softmax import GumbelSoftmaxMask
from sparsetrain.learned.hard_concrete import HardConcreteMask
from sparsetrain.learned.movement import ScoresAboveMask
from sparsetrain.learned.sharing import Sharing, share
from sparsetrain.learned.variational_dropout import VariationalDropoutMask
from sparsetrain.part import Part
from sparsetrain.structures import Block

SHAPE = (4, 6, 2, 2)


def scores_above(sharing: Sharing, scores: Tensor) -> ScoresAboveMask:
    mask = ScoresAboveMask(sharing, scores)
    mask.set_threshold(0.1)
    return mask


#: How to make a mask, and where in its gates' range the border is, for weights near 1.
KINDS: dict[str, tuple[Callable[[Sharing, Tensor], LearnedMask], float]] = {
    "hard_concrete": (HardConcreteMask, -2.4),
    "gumbel_softmax": (GumbelSoftmaxMask, 0.0),
    "movement": (scores_above, -2.2),
    "variational_dropout": (VariationalDropoutMask, 3.0),
}
CASES: list[tuple[str, Any]] = [
    *((kind, "weight") for kind in KINDS),
    *((kind, per) for kind in list(KINDS)[:2] for per in ("input", "output")),
    *((kind, Block(size=(2, 4))) for kind in ("gumbel_softmax", "movement")),
]
each_case = pytest.mark.parametrize(("kind", "per"), CASES)


def drawn(kind: str, per: Any, seed: int = 0, offset: float = 0.0) -> tuple[LearnedMask, Tensor]:
    """A mask with gates on both sides of the border, and the weight."""
    make, border = KINDS[kind]
    sharing = share(per, SHAPE)
    gates = numbers(seed, *sharing.gates) + border + offset
    return make(sharing, gates), numbers(seed + 1, *SHAPE)


@each_case
@settings(max_examples=20)
@given(seed=some.integers(0, 10_000))
def test_margins_are_positive_where_the_mask_keeps(kind: str, per: Any, seed: int) -> None:
    mask, weight = drawn(kind, per, seed)
    margins = mask.margins(weight)
    assert margins.shape == mask.sharing.gates
    assert torch.equal(mask.sharing.spread(margins > 0), mask.mask(weight))
    assert torch.equal(mask.eval()(weight) != 0, mask.mask(weight))


@each_case
@settings(max_examples=20)
@given(seed=some.integers(0, 10_000), keep=some.booleans(), data=some.data())
def test_gates_are_put_across_and_no_others(
    kind: str, per: Any, seed: int, keep: bool, data: Any
) -> None:
    mask, weight = drawn(kind, per, seed)
    (gate,) = mask.gates()
    before, was_kept = gate.detach().clone().flatten(), mask.margins(weight).flatten() > 0
    sides = (was_kept != keep).nonzero().view(-1).tolist()
    moved = data.draw(some.lists(some.sampled_from(sides), unique=True)) if sides else []
    indices = torch.tensor(moved, dtype=torch.int64)
    mask.put_across(weight, indices, keep=keep)
    expected = was_kept.clone()
    expected[indices] = keep
    margins = mask.margins(weight).flatten()
    assert torch.equal(mask.mask(weight), mask.sharing.spread(expected.view(mask.sharing.gates)))
    assert (margins[indices].abs() < 0.1).all()
    others = torch.ones_like(expected).index_fill_(0, indices, False)
    assert torch.equal(gate.detach().flatten()[others], before[others])


@each_case
def test_an_empty_layer_takes_up_the_gate_nearest_to_its_border(kind: str, per: Any) -> None:
    mask, weight = drawn(kind, per, 3, 30.0 if kind == "variational_dropout" else -30.0)
    nearest = mask.margins(weight).argmax()
    assert not mask.mask(weight).any()
    mask.revive(weight, Part(()), Part(()))
    expected = torch.zeros(mask.sharing.gates, dtype=torch.bool)
    expected.view(-1)[nearest] = True
    assert torch.equal(mask.mask(weight), mask.sharing.spread(expected))


@pytest.mark.parametrize("kind", KINDS)
def test_gates_of_any_memory_format_are_put_across(kind: str) -> None:
    mask, weight = drawn(kind, "weight", 5)
    mask.to(memory_format=torch.channels_last)
    weight = weight.to(memory_format=torch.channels_last)
    expected = mask.mask(weight).clone(memory_format=torch.contiguous_format)
    indices = (~expected).view(-1).nonzero().view(-1)[:7]
    expected.view(-1)[indices] = True
    mask.put_across(weight, indices, keep=True)
    assert torch.equal(mask.mask(weight), expected)


def test_weights_of_0_stay_dropped() -> None:
    mask, weight = drawn("variational_dropout", "weight")
    weight.view(-1)[:3] = 0.0
    mask.put_across(weight, torch.arange(6), keep=True)
    assert mask.mask(weight).view(-1)[:6].tolist() == [False] * 3 + [True] * 3
    assert torch.isfinite(mask.log_sigma2).all()
