"""Hard-concrete gates against equations 10 to 13 of Louizos et al. 2018."""

from __future__ import annotations

import math

import pytest
import torch
from learned_twins import (
    evaluation_gate,
    gate_numbers,
    gradients,
    hard_concrete,
    midpoints,
    numbers,
    output,
    probability_open,
    seeded,
)
from torch import Tensor, nn
from torch.func import functional_call

import sparsetrain as st
from sparsetrain.learned.hard_concrete import HardConcreteMask
from sparsetrain.learned.sharing import Per, share

SHAPE = (6, 4, 3)
LOG_ALPHAS = torch.tensor([-4.0, -2.0, -0.5, 0.0, 1.0, 3.0], dtype=torch.float64)
each_sharing = pytest.mark.parametrize("per", ["weight", "input", "output"])


def drawn(per: Per) -> tuple[HardConcreteMask, Tensor, Tensor]:
    """A mask, its log_alpha, and the number of each weight's gate."""
    sharing = share(per, SHAPE)
    log_alpha = numbers(1, *sharing.gates, scale=1.5)
    log_alpha.view(-1)[0] = -3.0
    return HardConcreteMask(sharing, log_alpha), log_alpha, gate_numbers(per, SHAPE, False)


def uniform(*shape: int) -> Tensor:
    """What the first call for random numbers gives under `seeded`."""
    with seeded():
        return torch.rand(shape, dtype=torch.float64)


def by_hand(weight: Tensor, log_alpha: Tensor, number: Tensor) -> Tensor:
    gates = hard_concrete(log_alpha, uniform(*log_alpha.shape))
    return weight * gates.flatten()[number]


@each_sharing
def test_a_training_pass_and_its_gradients(per: Per) -> None:
    mask, log_alpha, number = drawn(per)
    weight = numbers(0, *SHAPE)
    torch.testing.assert_close(output(mask, weight), by_hand(weight, log_alpha, number))
    ours = gradients(lambda w, a: output(mask, w, log_alpha=a), weight, log_alpha)
    twin = gradients(lambda w, a: by_hand(w, a, number), weight, log_alpha)
    torch.testing.assert_close(ours, twin)


@each_sharing
def test_gradients_are_those_of_finite_differences(per: Per) -> None:
    mask, log_alpha, _ = drawn(per)
    weight = numbers(0, *SHAPE).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda w, a: output(mask, w, log_alpha=a), (weight, log_alpha.clone().requires_grad_())
    )


@each_sharing
def test_evaluation_has_the_gates_of_equation_13(per: Per) -> None:
    mask, log_alpha, number = drawn(per)
    weight = numbers(0, *SHAPE)
    gates = evaluation_gate(log_alpha).flatten()[number]
    assert (gates == 0).any()
    torch.testing.assert_close(mask.eval()(weight), weight * gates)
    assert torch.equal(mask.mask(weight), gates > 0)
    ours = gradients(lambda w, a: output(mask, w, log_alpha=a), weight, log_alpha)
    twin = gradients(lambda w, a: w * evaluation_gate(a).flatten()[number], weight, log_alpha)
    torch.testing.assert_close(ours, twin)


def test_the_fixed_gate_is_0_up_to_log_alpha_of_minus_log_11() -> None:
    border = -math.log(11)
    log_alpha = torch.tensor([[border - 1e-9, border + 1e-9, 30.0]], dtype=torch.float64)
    mask = HardConcreteMask(share("weight", (1, 3)), log_alpha).eval()
    gates = mask(torch.ones(1, 3, dtype=torch.float64)).flatten().tolist()
    assert gates[0] == 0
    assert 0 < gates[1] < 1e-8
    assert gates[2] == 1


def samples(count: int) -> Tensor:
    """[log_alphas, count]: gates of training passes."""
    log_alpha = LOG_ALPHAS.unsqueeze(1).expand(-1, count).contiguous()
    mask = HardConcreteMask(share("weight", tuple(log_alpha.shape)), log_alpha)
    return output(mask, torch.ones_like(log_alpha)).detach()


def test_the_probability_of_an_open_gate_by_integration_over_the_noise() -> None:
    gates = hard_concrete(LOG_ALPHAS.unsqueeze(1), midpoints(100_000))
    share_open = (gates > 0).double().mean(1)
    torch.testing.assert_close(share_open, probability_open(LOG_ALPHAS), atol=2e-5, rtol=0)
    mask = HardConcreteMask(share("weight", (1, 6)), LOG_ALPHAS.view(1, 6))
    of_each = torch.autograd.grad(mask.penalty(torch.ones(1, 6)), mask.log_alpha)[0].flatten()
    slope = share_open * (1 - share_open)
    torch.testing.assert_close(of_each, slope, atol=2e-5, rtol=0)


def test_open_closed_and_mean_gates_of_training_passes() -> None:
    gates = samples(40_000)
    assert ((gates >= 0) & (gates <= 1)).all()
    means = hard_concrete(LOG_ALPHAS.unsqueeze(1), midpoints(100_000)).mean(1)
    full = torch.sigmoid(LOG_ALPHAS - 2 / 3 * math.log(11))
    torch.testing.assert_close(
        (gates > 0).double().mean(1), probability_open(LOG_ALPHAS), atol=0.01, rtol=0
    )
    torch.testing.assert_close((gates == 1).double().mean(1), full, atol=0.01, rtol=0)
    torch.testing.assert_close(gates.mean(1), means, atol=0.01, rtol=0)


@each_sharing
@pytest.mark.parametrize("l2", [0.0, 0.3])
def test_the_penalty_is_the_expected_count_and_squared_norm(per: Per, l2: float) -> None:
    mask, log_alpha, number = drawn(per)
    mask.l2 = l2
    weight = numbers(0, *SHAPE)
    chance = probability_open(log_alpha).flatten()[number]
    expected = chance.sum() + (chance * 0.5 * l2 * weight**2).sum()
    torch.testing.assert_close(mask.penalty(weight), expected)


def test_the_range_of_log_alpha() -> None:
    mask = HardConcreteMask(share("weight", (1, 3)), torch.tensor([[-9.0, 0.5, 9.0]]))
    mask.constrain()
    expected = torch.tensor([[math.log(0.01), 0.5, math.log(100)]])
    torch.testing.assert_close(mask.log_alpha.data, expected)


LAYERS = {
    "linear": (lambda: nn.Linear(5, 3), (7, 5)),
    "tokens": (lambda: nn.Linear(5, 3, bias=False), (7, 2, 5)),
    "conv": (lambda: nn.Conv2d(5, 3, 3, padding=1), (7, 5, 4, 4)),
}


@pytest.mark.parametrize("per", ["input", "output"])
@pytest.mark.parametrize("name", LAYERS)
def test_gates_of_each_example(name: str, per: Per) -> None:
    make, shape = LAYERS[name]
    layer = make().double()
    policy = st.HardConcrete(strength=1e-3, sampling="example", per=per, spread=2.0)
    st.SparseOptimizer(torch.optim.SGD(layer.parameters(), lr=0.1), layer, policy)
    mask = layer.parametrizations.weight[0]
    weight = layer.parametrizations.weight.original.detach()
    x = numbers(2, *shape)
    with seeded():
        ours = layer(x)
    gates = hard_concrete(mask.log_alpha.flatten(), uniform(7, mask.log_alpha.numel()))
    for number in range(7):
        gated = weight * gates[number][gate_numbers(per, tuple(weight.shape), False)]
        values = {"weight": gated} | ({} if layer.bias is None else {"bias": layer.bias})
        expected = functional_call(make().double(), values, (x[number : number + 1],))
        torch.testing.assert_close(ours[number : number + 1], expected)


def test_evaluation_has_the_fixed_gates_for_every_example() -> None:
    layer = nn.Linear(5, 3).double()
    policy = st.HardConcrete(strength=1e-3, sampling="example", per="input", spread=2.0)
    st.SparseOptimizer(torch.optim.SGD(layer.parameters(), lr=0.1), layer, policy)
    layer.eval()
    gates = evaluation_gate(layer.parametrizations.weight[0].log_alpha)
    x = numbers(2, 7, 5)
    expected = (x * gates) @ layer.parametrizations.weight.original.T + layer.bias
    torch.testing.assert_close(layer(x), expected)
