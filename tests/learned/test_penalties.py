"""Gradients of the regularisers in closed form, and masks under torch.func."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from learned_twins import numbers, seeded
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import Parameter
from torch.nn import functional as F

import sparsetrain as st
from sparsetrain.learned import LearnedMask
from sparsetrain.learned.gumbel_softmax import GumbelSoftmaxMask
from sparsetrain.learned.hard_concrete import HardConcreteMask
from sparsetrain.learned.movement import ScoresAboveMask, TopScoresMask
from sparsetrain.learned.sharing import Sharing, share
from sparsetrain.learned.variational_dropout import VariationalDropoutMask
from sparsetrain.structures import Block

SHAPE = (4, 6, 2)
MASKS: dict[str, tuple[Callable[[Sharing, Tensor], LearnedMask], list[Any]]] = {
    "hard_concrete": (HardConcreteMask, ["weight", "input", "output"]),
    "hard_concrete with l2": (partial(HardConcreteMask, l2=0.3), ["weight", "input", "output"]),
    "gumbel_softmax": (GumbelSoftmaxMask, ["weight", "input", Block(size=(2, 3))]),
    "movement": (ScoresAboveMask, ["weight", Block(size=(2, 3))]),
    "variational_dropout": (VariationalDropoutMask, ["weight"]),
}
CASES = [(name, per) for name, (_, pers) in MASKS.items() for per in pers]
each_case = pytest.mark.parametrize(("name", "per"), CASES)


def drawn(name: str, per: Any) -> tuple[LearnedMask, Parameter]:
    sharing = share(per, SHAPE)
    # Some variances are so far from their weights that log alpha is clipped.
    gates = numbers(1, *sharing.gates, scale=6.0 if name == "variational_dropout" else 1.5)
    return MASKS[name][0](sharing, gates), Parameter(numbers(0, *SHAPE))


@each_case
@pytest.mark.parametrize("start", [None, 0.7])
def test_closed_forms_are_the_gradients_of_the_penalty(
    name: str, per: Any, start: float | None
) -> None:
    mask, weight = drawn(name, per)
    parameters = [*mask.gates(), weight]
    strength, penalty = 0.3, mask.penalty(weight)
    slopes = torch.autograd.grad(penalty, parameters, allow_unused=True)
    for parameter in parameters:
        parameter.grad = None if start is None else torch.full_like(parameter, start)
    mask.add_penalty_gradient(weight, strength)
    for parameter, slope in zip(parameters, slopes, strict=True):
        slope = torch.zeros_like(parameter) if slope is None else slope
        added = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(added - (start or 0.0), strength * slope)
    assert all(p.requires_grad and p.grad_fn is None for p in parameters)


@each_case
def test_the_penalty_falls_along_its_gradient(name: str, per: Any) -> None:
    mask, weight = drawn(name, per)
    (gate,) = mask.gates()
    gate.grad = None
    mask.add_penalty_gradient(weight, 1.0)
    before = mask.penalty(weight)
    gate.data.sub_(gate.grad, alpha=1e-3)
    assert mask.penalty(weight) < before


@each_case
def test_what_is_frozen_gets_no_gradient(name: str, per: Any) -> None:
    mask, weight = drawn(name, per)
    for parameter in (*mask.gates(), weight):
        parameter.requires_grad_(False)
    mask.add_penalty_gradient(weight, 1.0)
    assert all(parameter.grad is None for parameter in (*mask.gates(), weight))


def test_ranked_scores_have_no_penalty() -> None:
    mask = TopScoresMask(share("weight", SHAPE), numbers(1, *SHAPE))
    weight = Parameter(numbers(0, *SHAPE))
    assert mask.penalty(weight) == 0
    assert not mask.has_penalty


# Per-example gradients.

POLICIES: dict[str, st.Policy] = {
    "soft_threshold": st.SoftThreshold(strength=0.1, initial=-2.0),
    "soft_threshold of outputs": st.SoftThreshold(strength=0.1, initial=-2.0, per="output"),
    "movement": st.Movement(sparsity=0.5, total_steps=10),
    "movement of blocks": st.Movement(
        mode="threshold", strength=0.1, structure={"kind": "block", "size": (2, 2)}
    ),
    "hard_concrete": st.HardConcrete(strength=0.1),
    "hard_concrete of inputs": st.HardConcrete(strength=0.1, per="input"),
    "gumbel_softmax": st.GumbelSoftmax(strength=0.1, hard=False),
    "gumbel_softmax of blocks": st.GumbelSoftmax(
        strength=0.1, structure={"kind": "block", "size": (2, 2)}
    ),
    "n:m": st.GumbelSoftmax(structure={"kind": "n_m", "n": 1, "m": 2}),
    "variational_dropout": st.VariationalDropout(strength=0.1, warm_up=0, log_sigma2=-2.0),
    "variational_dropout of weights": st.VariationalDropout(
        strength=0.1, warm_up=0, log_sigma2=-2.0, local=False, clip=False
    ),
}


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("training", [True, False])
def test_per_example_gradients_under_vmap(name: str, training: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 6)).double()
    st.SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, POLICIES[name])
    model.train(training)
    parameters = {k: p.detach() for k, p in model.named_parameters()}
    assert any("parametrizations" in k and "original" not in k for k in parameters)
    x, y = numbers(0, 3, 6), numbers(1, 3, 6)

    def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(functional_call(model, values, (x.unsqueeze(0),)), y.unsqueeze(0))

    with seeded():
        together = vmap(grad(loss), in_dims=(None, 0, 0), randomness="same")(parameters, x, y)
    for number in range(3):
        with seeded():
            alone = grad(loss)(parameters, x[number], y[number])
        for key, value in alone.items():
            torch.testing.assert_close(together[key][number], value)
