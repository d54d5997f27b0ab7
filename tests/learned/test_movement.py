"""Masks by scores against equations 3 and 4 of Sanh et al. 2020."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from learned_twins import gate_numbers, gradients, masked_by_scores, numbers, output
from runs import STEPS, backward, train, wrap
from torch import Tensor

import sparsetrain as st
from sparsetrain.learned.movement import ScoresAboveMask, TopScoresMask
from sparsetrain.learned.sharing import share
from sparsetrain.structures import Block

SHAPE = (4, 6, 2)
THRESHOLD = 0.4
Mask = TopScoresMask | ScoresAboveMask
each_mask = pytest.mark.parametrize("kind", [TopScoresMask, ScoresAboveMask])
each_sharing = pytest.mark.parametrize("per", ["weight", (2, 3), (4, 1)])


def drawn(kind: type[Mask], per: Any) -> tuple[Mask, Tensor, Tensor]:
    """A mask, which gates it keeps, and the number of each weight's gate."""
    sharing = share(Block(size=per) if isinstance(per, tuple) else per, SHAPE)
    scores = numbers(1, *sharing.gates)
    mask = kind(sharing, scores)
    if isinstance(mask, ScoresAboveMask):
        mask.set_threshold(THRESHOLD)
        kept = 1 / (1 + torch.exp(-scores)) > THRESHOLD
    else:
        kept = numbers(2, *sharing.gates) > 0.3
        mask.chosen.copy_(kept)
    assert kept.any()
    assert not kept.all()
    return mask, kept, gate_numbers(per, SHAPE, False)


@each_mask
@each_sharing
@pytest.mark.parametrize("training", [True, False])
def test_kept_weights_pass_and_others_are_0(kind: type[Mask], per: Any, training: bool) -> None:
    mask, kept, number = drawn(kind, per)
    weight, passes = numbers(0, *SHAPE), kept.flatten()[number]
    assert torch.equal(mask.train(training)(weight), torch.where(passes, weight, 0.0))
    assert torch.equal(mask.mask(weight), passes)


@each_mask
@each_sharing
def test_gradients_are_those_of_a_straight_through_mask(kind: type[Mask], per: Any) -> None:
    mask, kept, number = drawn(kind, per)
    weight, scores = numbers(0, *SHAPE), mask.scores.detach()
    ours = gradients(lambda w, s: output(mask, w, scores=s), weight, scores)
    twin = gradients(lambda w, s: masked_by_scores(w, s, kept, number), weight, scores)
    torch.testing.assert_close(ours, twin)


@each_mask
@each_sharing
def test_scores_get_gradient_times_weight_summed_over_a_block(kind: type[Mask], per: Any) -> None:
    mask, _, number = drawn(kind, per)
    weight, slope = numbers(0, *SHAPE), numbers(3, *SHAPE)
    (mask(weight) * slope).sum().backward()
    sums = torch.zeros(mask.scores.numel(), dtype=torch.float64)
    for gate, product in zip(number.flatten(), (weight * slope).flatten(), strict=True):
        sums[gate] += product
    torch.testing.assert_close(mask.scores.grad.flatten(), sums)


@each_mask
@each_sharing
def test_gradients_of_weights_are_masked(kind: type[Mask], per: Any) -> None:
    mask, kept, number = drawn(kind, per)
    mask.scores.requires_grad_(False)
    weight = numbers(0, *SHAPE).requires_grad_()
    assert torch.autograd.gradcheck(mask, (weight,))
    mask(weight).sum().backward()
    assert torch.equal(weight.grad, kept.flatten()[number].double())


@each_sharing
def test_the_penalty_is_the_sum_of_sigmoids(per: Any) -> None:
    mask, _, number = drawn(ScoresAboveMask, per)
    scores = mask.scores.detach().flatten()[number]
    torch.testing.assert_close(
        mask.penalty(numbers(0, *SHAPE)), (1 / (1 + torch.exp(-scores))).sum()
    )


def test_nothing_is_dropped_at_a_threshold_of_0() -> None:
    mask = ScoresAboveMask(share("weight", SHAPE), numbers(1, *SHAPE, scale=5.0))
    assert mask.mask(numbers(0, *SHAPE)).all()
    assert (mask.margins(numbers(0, *SHAPE)) > 0).all()


@each_sharing
def test_the_choice_comes_back_from_the_mask_of_a_checkpoint(per: Any) -> None:
    mask, kept, _ = drawn(TopScoresMask, per)
    stored = mask.mask(numbers(0, *SHAPE)).clone()
    mask.chosen.fill_(True)
    mask.restore(stored)
    assert torch.equal(mask.chosen, kept)


def test_a_mask_that_was_asked_for_does_not_change_with_the_next_choice() -> None:
    mask, kept, _ = drawn(TopScoresMask, "weight")
    asked = mask.mask(numbers(0, *SHAPE))
    mask.chosen.copy_(~kept)
    assert torch.equal(asked, kept)


def test_what_an_update_dropped_is_reported() -> None:
    policy = st.Movement(sparsity=0.8, total_steps=STEPS, update={"every": 3})
    model, optimizer = wrap("momentum", policy)
    target = optimizer.targets["hidden.weight"]
    target.settle()[:2]
    before = optimizer.masks()["hidden.weight"].clone()
    target.learned.chosen.view(-1)[:5] = False
    assert target.settle()[:2] == (5, 0)
    assert int((before & ~target.mask).sum()) == 5
    assert model.hidden.weight.count_nonzero() == before.sum() - 5


@pytest.mark.parametrize("mode", ["top_k", "threshold"])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_a_wanted_sparsity_is_followed_to_the_weight_at_every_update(
    mode: Any, allocation: Any
) -> None:
    policy = st.Movement(
        sparsity=0.8, total_steps=STEPS, update={"every": 3}, mode=mode, allocation=allocation
    )
    model, optimizer = wrap("momentum", policy)
    followed: dict[int, float] = {}
    optimizer.register_update_hook(lambda e: followed.__setitem__(e.step, e.sparsity))
    train(model, optimizer, 0, STEPS)
    assert list(followed) == [0, 3, 6, 9, 12, 13]
    numel = sum(target.numel for target in optimizer.targets.values())
    rounding = len(optimizer.targets) / numel
    for step, sparsity in followed.items():
        assert sparsity == pytest.approx(0.8 * policy.reached(step), abs=rounding)


def test_the_soft_penalty_pulls_as_hard_as_the_loss_at_every_update() -> None:
    policy = st.Movement(
        sparsity=0.8, total_steps=STEPS, update={"every": 3}, mode="threshold", allocation="global"
    )
    model, optimizer = wrap("sgd", policy)
    scores = [target.learned.scores for target in optimizer.targets.values()]
    memory = optimizer._keeper.groups[0][1].memory
    for step in range(STEPS):
        backward(model, step)
        of_loss = sum(float(s.grad.abs().sum()) for s in scores)
        known = [s.detach() for s in scores]
        slopes = sum(float((s.sigmoid() * (-s).sigmoid()).sum()) for s in known)
        optimizer.step()
        if step % 3 == 0:
            assert memory["all.strength"] * slopes == pytest.approx(of_loss, rel=1e-4)


def test_the_soft_penalty_fades_where_all_scores_are_decided() -> None:
    policy = st.Movement(
        sparsity=0.8, total_steps=STEPS, update={"every": 3}, mode="threshold", allocation="global"
    )
    model, optimizer = wrap("sgd", policy)
    for target in optimizer.targets.values():
        target.learned.scores.data.fill_(200.0)
    backward(model, 0)
    found = [target.learned.scores.grad.detach() for target in optimizer.targets.values()]
    mean = sum(float(g.abs().sum()) for g in found) / sum(g.numel() for g in found)
    optimizer.step()
    memory = optimizer._keeper.groups[0][1].memory
    assert memory["all.strength"] == pytest.approx(mean / 0.0025, rel=1e-4)
    train(model, optimizer, 1, STEPS)
    assert all(target.learned.scores.isfinite().all() for target in optimizer.targets.values())
