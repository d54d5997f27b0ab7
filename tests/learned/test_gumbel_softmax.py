"""Gumbel-softmax masks against equations 1 and 2 of Jang et al. 2017, with a logit a choice."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from learned_twins import (
    gate_numbers,
    gradients,
    gumbel_softmax,
    n_m_weight,
    numbers,
    output,
    seeded,
)
from torch import Tensor

from sparsetrain.learned.gumbel_softmax import GumbelSoftmaxMask, PatternMask, patterns
from sparsetrain.learned.sharing import Sharing, share
from sparsetrain.structures import NM, Block

SHAPE = (4, 6, 2)
COUNT = 40_000
LOGITS = torch.tensor([-3.0, -1.0, 0.0, 0.5, 2.0], dtype=torch.float64)
each_sharing = pytest.mark.parametrize("per", ["weight", "input", "output", (2, 4)])
each_temperature = pytest.mark.parametrize("temperature", [0.1, 0.7, 2.0])


def drawn(per: Any, *, hard: bool, temperature: float = 0.7) -> tuple[GumbelSoftmaxMask, Tensor]:
    """A mask and the number of each weight's gate."""
    sharing = share(Block(size=per) if isinstance(per, tuple) else per, SHAPE)
    mask = GumbelSoftmaxMask(sharing, numbers(1, *sharing.gates), hard=hard)
    mask.temperature.fill_(temperature)
    return mask, gate_numbers(per, SHAPE, False)


def soft_by_hand(weight: Tensor, logit: Tensor, number: Tensor, temperature: float) -> Tensor:
    """With the noise of a training pass under `seeded`."""
    with seeded():
        u = torch.rand(logit.shape, dtype=torch.float64)
    keep = torch.exp((logit + u.log() - (1 - u).log()) / temperature)
    return weight * (keep / (1 + keep)).flatten()[number]


@each_sharing
@each_temperature
def test_a_soft_pass_and_its_gradients(per: Any, temperature: float) -> None:
    mask, number = drawn(per, hard=False, temperature=temperature)
    weight, logit = numbers(0, *SHAPE), mask.logit.detach()
    expected = soft_by_hand(weight, logit, number, temperature)
    torch.testing.assert_close(output(mask, weight), expected)
    ours = gradients(lambda w, x: output(mask, w, logit=x), weight, logit)
    twin = gradients(lambda w, x: soft_by_hand(w, x, number, temperature), weight, logit)
    torch.testing.assert_close(ours, twin)


@each_sharing
def test_soft_gradients_are_those_of_finite_differences(per: Any) -> None:
    mask, _ = drawn(per, hard=False)
    weight = numbers(0, *SHAPE).requires_grad_()
    logit = mask.logit.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda w, x: output(mask, w, logit=x), (weight, logit))


@each_sharing
def test_a_hard_pass_rounds_the_gates_and_has_the_soft_gradient_of_logits(per: Any) -> None:
    (hard, number), (soft, _) = drawn(per, hard=True), drawn(per, hard=False)
    ones = torch.ones(SHAPE, dtype=torch.float64)
    chosen = (output(soft, ones) > 0.5).double()
    assert torch.equal(output(hard, ones), chosen)
    weight, logit = numbers(0, *SHAPE), hard.logit.detach()
    of_weight, of_logit = gradients(lambda w, x: output(hard, w, logit=x), weight, logit)
    (soft_slope,) = gradients(lambda x: soft_by_hand(weight, x, number, 0.7), logit)
    torch.testing.assert_close(of_logit, soft_slope)
    torch.testing.assert_close(of_weight, gradients(lambda w: w * chosen, weight)[0])


@each_sharing
def test_evaluation_keeps_the_more_probable(per: Any) -> None:
    mask, number = drawn(per, hard=True)
    weight, kept = numbers(0, *SHAPE), mask.logit.detach().flatten()[number] > 0
    assert torch.equal(mask.eval()(weight), torch.where(kept, weight, 0.0))
    assert torch.equal(mask.mask(weight), kept)


def samples(*, hard: bool, temperature: float) -> Tensor:
    """[logits, count]: gates of training passes."""
    logit = LOGITS.unsqueeze(1).expand(-1, COUNT).contiguous()
    mask = GumbelSoftmaxMask(share("weight", tuple(logit.shape)), logit, hard=hard)
    mask.temperature.fill_(temperature)
    return output(mask, torch.ones_like(logit)).detach()


@each_temperature
def test_hard_gates_are_open_with_the_probability_of_the_logit(temperature: float) -> None:
    share_open = samples(hard=True, temperature=temperature).mean(1)
    torch.testing.assert_close(share_open, torch.sigmoid(LOGITS), atol=0.01, rtol=0)


@each_temperature
def test_one_logistic_logit_is_two_gumbel_logits_in_distribution(temperature: float) -> None:
    ours = samples(hard=False, temperature=temperature)
    two = torch.stack([LOGITS + 0.3, torch.full_like(LOGITS, 0.3)], -1).unsqueeze(1)
    with seeded(1):
        u = torch.rand(len(LOGITS), COUNT, 2, dtype=torch.float64)
    twin = gumbel_softmax(two, u, temperature)[..., 0]
    below = [
        torch.stack([(gates <= x).double().mean(1) for x in torch.linspace(0.01, 0.99, 50)])
        for gates in (ours, twin)
    ]
    distance = (below[0] - below[1]).abs().max()
    assert distance < 1.95 * math.sqrt(2 / COUNT)  # Kolmogorov-Smirnov at 0.1 %


def test_gates_get_hard_as_the_temperature_falls() -> None:
    hard = samples(hard=True, temperature=1.0)
    distances = [
        float((samples(hard=False, temperature=t) - hard).abs().mean()) for t in (1.0, 0.1, 1e-4)
    ]
    assert distances[0] > 5 * distances[1] > 100 * distances[2]
    assert distances[2] < 1e-4


@each_sharing
def test_the_penalty_is_the_expected_count(per: Any) -> None:
    mask, number = drawn(per, hard=True)
    expected = torch.sigmoid(mask.logit).flatten()[number].sum()
    torch.testing.assert_close(mask.penalty(numbers(0, *SHAPE)), expected)


# One of the patterns n:m.

SCALE, TEMPERATURE = 1.5, 0.6
some_n_m = some.integers(1, 6).flatmap(lambda m: some.tuples(some.integers(1, m), some.just(m)))


def pattern_mask(n: int, m: int, shape: tuple[int, ...], *, hard: bool) -> PatternMask:
    structure = NM(n=n, m=m)
    logits = numbers(1, math.prod(shape) // m, math.comb(m, n))
    mask = PatternMask(structure, Sharing(shape, shape, shape), logits, hard=hard)
    mask.scale.fill_(SCALE)
    mask.temperature.fill_(TEMPERATURE)
    return mask


@given(some_n_m)
def test_the_patterns_are_all_ways_to_keep_n_of_m(n_m: tuple[int, int]) -> None:
    n, m = n_m
    table = patterns(NM(n=n, m=m))
    rows = {tuple(row) for row in table.tolist()}
    assert len(rows) == len(table) == math.comb(m, n)
    assert all(len(row) == m and row.count(1.0) == n == sum(row) for row in rows)


@pytest.mark.parametrize("shape", [(3, 8), (2, 4, 3)])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2), (3, 4)])
@pytest.mark.parametrize("hard", [False, True])
def test_a_pass_with_patterns_and_its_gradients(
    shape: tuple[int, ...], n: int, m: int, hard: bool
) -> None:
    mask = pattern_mask(n, m, shape, hard=hard)
    weight, logits = numbers(0, *shape), mask.logits.detach()
    with seeded():
        u = torch.rand(logits.shape, dtype=torch.float64)

    def by_hand(weight: Tensor, logits: Tensor) -> Tensor:
        shares = gumbel_softmax(SCALE * logits, u, TEMPERATURE)
        if hard:
            one = (shares == shares.amax(-1, keepdim=True)).double()
            shares = one + shares - shares.detach()
        return n_m_weight(weight, shares, n, m)

    torch.testing.assert_close(output(mask, weight), by_hand(weight, logits))
    ours = gradients(lambda w, x: output(mask, w, logits=x), weight, logits)
    torch.testing.assert_close(ours, gradients(by_hand, weight, logits))


@pytest.mark.parametrize("shape", [(3, 8), (2, 4, 3)])
def test_evaluation_has_the_most_probable_pattern(shape: tuple[int, ...]) -> None:
    mask = pattern_mask(2, 4, shape, hard=True).eval()
    weight = numbers(0, *shape)
    best = mask.logits.detach() == mask.logits.detach().amax(-1, keepdim=True)
    torch.testing.assert_close(mask(weight), n_m_weight(weight, best.double(), 2, 4))
    assert torch.equal(mask.mask(weight), mask(weight) != 0)


@given(n_m=some_n_m, training=some.booleans())
def test_hard_masks_keep_n_of_every_m(n_m: tuple[int, int], training: bool) -> None:
    n, m = n_m
    mask = pattern_mask(n, m, (3, 2 * m, 2), hard=True).train(training)
    kept = output(mask, torch.ones(3, 2 * m, 2, dtype=torch.float64)).detach()
    assert (kept.view(3, 2, m, 2) != 0).sum(2).eq(n).all()
    assert ((kept == 0) | ((kept - 1).abs() < 1e-12)).all()


def test_patterns_are_drawn_with_the_probability_of_their_logits() -> None:
    shape = (8_000, 4)
    mask = pattern_mask(2, 4, shape, hard=True)
    mask.logits.data.copy_(mask.logits.data[:1].expand_as(mask.logits))
    kept = output(mask, torch.ones(shape, dtype=torch.float64)).detach().round()
    share_drawn = (kept.unsqueeze(1) == mask.patterns).all(-1).double().mean(0)
    expected = torch.softmax(SCALE * mask.logits[0].detach(), 0)
    torch.testing.assert_close(share_drawn, expected, atol=0.02, rtol=0)
