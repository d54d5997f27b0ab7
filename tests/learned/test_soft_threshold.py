"""Learned soft thresholds against equation 3 of Kusupati et al. 2020 and its autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as some
from learned_twins import gradients, numbers, output, soft_threshold
from runs import SmallNet, train
from torch import Tensor

import sparsetrain as st
from sparsetrain.learned.sharing import Sharing
from sparsetrain.learned.soft_threshold import Curve, SoftThresholdMask
from sparsetrain.part import Part

SHAPE = (5, 4, 3, 3)
PER_LAYER, PER_OUTPUT = (1, 1, 1, 1), (5, 1, 1, 1)
cases = pytest.mark.parametrize(
    ("curve", "gates"),
    [("sigmoid", PER_LAYER), ("sigmoid", PER_OUTPUT), ("exponential", PER_OUTPUT)],
)


def mask_of(s: Tensor, curve: Curve, shape: tuple[int, ...] = SHAPE) -> SoftThresholdMask:
    mask = SoftThresholdMask(Sharing(shape, shape, tuple(s.shape)), torch.zeros_like(s), curve)
    mask.threshold_logit.data.copy_(s)
    return mask


def drawn(gates: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Weights and s for which a good part of the weights is dropped, and none nearly so."""
    s = numbers(1, *gates, scale=0.5) - 0.7
    weight = numbers(0, *SHAPE)
    for threshold in (torch.sigmoid(s), torch.exp(s)):
        assert ((weight.abs() - threshold).abs() > 1e-4).all()
        assert 0.2 < (weight.abs() < threshold).double().mean() < 0.8
    return weight, s


@cases
@pytest.mark.parametrize("training", [True, False])
def test_the_weight_is_that_of_equation_3(
    curve: Curve, gates: tuple[int, ...], training: bool
) -> None:
    weight, s = drawn(gates)
    mask = mask_of(s, curve).train(training)
    torch.testing.assert_close(mask(weight), soft_threshold(weight, s, curve))
    assert torch.equal(mask.mask(weight), soft_threshold(weight, s, curve) != 0)


@cases
def test_gradients_are_those_of_autograd(curve: Curve, gates: tuple[int, ...]) -> None:
    weight, s = drawn(gates)
    mask = mask_of(s, curve)
    ours = gradients(lambda w, t: output(mask, w, threshold_logit=t), weight, s)
    twin = gradients(lambda w, t: soft_threshold(w, t, curve), weight, s)
    torch.testing.assert_close(ours, twin)
    assert (ours[0][~mask.mask(weight)] == 0).all()


@cases
def test_gradients_are_those_of_finite_differences(curve: Curve, gates: tuple[int, ...]) -> None:
    weight, s = (tensor.requires_grad_() for tensor in drawn(gates))
    mask = mask_of(s.detach(), curve)
    assert torch.autograd.gradcheck(
        lambda w, t: output(mask, w, threshold_logit=t), (weight, s), eps=1e-6
    )


def test_a_threshold_that_underflows_drops_nothing() -> None:
    weight, s = numbers(0, *SHAPE).float(), torch.full(PER_LAYER, -3200.0)
    mask = mask_of(s, "sigmoid")
    assert torch.equal(mask(weight), weight)
    assert mask.mask(weight).all()


@pytest.mark.parametrize("curve", ["sigmoid", "exponential"])
@given(level=some.floats(-4, 4))
def test_a_shift_drops_the_weights_of_lower_level(curve: Curve, level: float) -> None:
    weight, s = drawn(PER_OUTPUT)
    mask = mask_of(s, curve)
    levels = mask.levels(weight).detach()
    assume(((levels - level).abs() > 1e-6).all())
    mask.shift(level)
    assert torch.equal(mask.mask(weight), levels > level)


def test_weights_of_0_have_the_lowest_level_and_those_beyond_1_the_highest() -> None:
    weight = torch.tensor([[0.0, 1e-30, 0.5, 0.999, 1.0, 7.0]], dtype=torch.float64)
    mask = mask_of(torch.zeros(1, 1, dtype=torch.float64), "sigmoid", (1, 6))
    levels = mask.levels(weight)
    assert torch.equal(levels, levels.sort().values)
    assert not levels.isnan().any()


@cases
def test_revival_keeps_the_weight_of_highest_level(curve: Curve, gates: tuple[int, ...]) -> None:
    weight, s = numbers(0, *SHAPE, scale=0.01), numbers(1, *gates, scale=0.2)
    mask = mask_of(s, curve)
    highest = mask.levels(weight).argmax()
    assert not mask.mask(weight).any()
    with torch.no_grad():
        mask.revive(weight, Part(()), Part(()))
    assert mask.mask(weight).flatten().nonzero().view(-1).tolist() == [highest]
    shift = mask.threshold_logit.detach() - s
    torch.testing.assert_close(shift, shift.flatten()[:1].expand(gates))


@pytest.mark.parametrize("zeros", ["half of each layer", "a whole layer"])
def test_weights_of_0_do_not_disturb_the_sparsity(zeros: str) -> None:
    policy = st.SoftThreshold(sparsity=0.7, total_steps=40, update={"every": 2})
    model = SmallNet()
    with torch.no_grad():
        for name in ("conv", "hidden", "head") if zeros.startswith("half") else ("hidden",):
            weight = model.get_submodule(name).weight
            weight.view(-1)[: weight.numel() // 2 if zeros.startswith("half") else None] = 0.0
    optimizer = st.SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), model, policy)
    for step in range(40):
        train(model, optimizer, step, step + 1)
        assert optimizer.sparsity() < 0.72
    assert optimizer.sparsity() == pytest.approx(0.7, abs=5e-3)
