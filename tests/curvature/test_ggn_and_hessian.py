"""GGN and Hessian diagonals against the whole Hessian in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from curvature_cases import Loss, case, largest_error, slow_hessian
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrain.curvature import ggn_diagonal, hessian_diagonal

_WEIGHTS = torch.tensor([0.3, 1.0, 2.0, 0.1], dtype=torch.float64)
LOSSES: dict[str, Loss] = {
    "cross_entropy": F.cross_entropy,
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.1),
    "weighted": nn.CrossEntropyLoss(weight=_WEIGHTS),
    "weighted_sum": nn.CrossEntropyLoss(weight=_WEIGHTS, reduction="sum"),
    "wrapped": lambda outputs, targets: 0.5 * F.cross_entropy(outputs, targets),
    "squares": lambda outputs, targets: (outputs - F.one_hot(targets, 4)).square().sum(),
}
each_loss = pytest.mark.parametrize("loss", list(LOSSES))


@each_loss
@pytest.mark.parametrize("method", ["auto", "vmap", "loop"])
def test_the_ggn_of_a_relu_net_is_its_hessian(loss: str, method: Any) -> None:
    made = case("relu")
    found = ggn_diagonal(made.model, made.batches, LOSSES[loss], method=method)
    assert largest_error(found, slow_hessian(made, LOSSES[loss])) < 1e-12
    assert found.curvature == "GGN"


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", ["residual", "twice", "tied", "time_first", "unused"])
@pytest.mark.parametrize("estimate", ["exact", "monte_carlo"])
def test_passes_are_added_up_in_every_way(name: str, estimate: Any) -> None:
    made = case(name)
    options: Any = {"estimate": estimate, "probes": 3}
    loss = LOSSES["cross_entropy"]
    found = ggn_diagonal(made.model, made.batches, loss, **options)
    slow = ggn_diagonal(made.model, made.batches, loss, method="vmap", **options)
    assert largest_error(found, slow) < 1e-12


@each_loss
def test_the_ggn_of_a_tanh_net_is_not_its_hessian(loss: str) -> None:
    made = case("tanh")
    whole = slow_hessian(made, LOSSES[loss])
    found = ggn_diagonal(made.model, made.batches, LOSSES[loss])
    assert largest_error(found, whole) > 0.1
    assert all((value >= 0).all() for value in found.values())
    assert any((value < 0).any() for value in whole.values())


@each_loss
@pytest.mark.parametrize("name", ["relu", "tanh"])
def test_the_exact_hessian(name: str, loss: str) -> None:
    made = case(name)
    found = hessian_diagonal(made.model, made.batches, LOSSES[loss])
    assert largest_error(found, slow_hessian(made, LOSSES[loss])) < 1e-12
    assert found.curvature == "Hessian"


def test_the_hessian_goes_through_attention() -> None:
    made = case("tokens")
    names = ["block.self_attn.in_proj_bias", "norm.weight"]
    found = hessian_diagonal(made.model, made.batches, F.cross_entropy, parameters=names)
    whole = slow_hessian(made, F.cross_entropy)
    assert largest_error(found, {name: whole[name] for name in names}) < 1e-10


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "squares"])  # one by one: slow
def test_monte_carlo_is_right_on_average(loss: str) -> None:
    made = case("tanh")
    exact = ggn_diagonal(made.model, made.batches, LOSSES[loss])
    options: Any = {"estimate": "monte_carlo", "seed": 3}
    few = ggn_diagonal(made.model, made.batches, LOSSES[loss], probes=1, **options)
    many = ggn_diagonal(made.model, made.batches, LOSSES[loss], probes=1000, **options)
    assert largest_error(many, exact) < 0.06 < largest_error(few, exact) < 2.0
    assert many.curvature == "GGN, Monte Carlo with 1000 probes"


def test_monte_carlo_over_tokens_leaves_out_ignored_ones() -> None:
    made = case("tokens")
    made.y[0, :3] = -100
    loss = nn.CrossEntropyLoss()
    names = ["norm.weight", "block.linear1.weight"]
    # A function of the loss is not known to be cross-entropy: by the Hessian of 66 outputs.
    exact = ggn_diagonal(made.model, made.batches, lambda o, t: loss(o, t), parameters=names)
    options: Any = {"estimate": "monte_carlo", "probes": 600, "parameters": names}
    found = ggn_diagonal(made.model, made.batches, loss, **options)
    assert largest_error(found, exact) < 0.08


def test_hutchinson_is_right_on_average() -> None:
    made = case("tanh")
    options: Any = {"estimate": "hutchinson"}
    exact = hessian_diagonal(made.model, made.batches, F.cross_entropy)
    few = hessian_diagonal(made.model, made.batches, F.cross_entropy, probes=10, **options)
    many = hessian_diagonal(made.model, made.batches, F.cross_entropy, probes=2000, **options)
    assert largest_error(many, exact) < 0.5 < largest_error(few, exact)
    assert many.curvature == "Hessian, Hutchinson with 2000 probes"


def test_a_loss_that_is_not_convex_has_no_ggn() -> None:
    made = case("tanh")
    with pytest.raises(ValueError, match="not convex in the model's outputs"):
        ggn_diagonal(made.model, made.batches, lambda o, t: -F.cross_entropy(o, t))


def test_too_many_outputs_are_refused_for_an_unknown_loss() -> None:
    model = nn.Linear(2, 2000)
    batches = [(torch.randn(3, 2), torch.randn(3, 2000))]
    with pytest.raises(ValueError, match="2000 outputs, too many"):
        ggn_diagonal(model, batches, lambda o, t: (o - t).square().sum())


@pytest.mark.parametrize("probes", [0, -1])
def test_probes_are_counted(probes: int) -> None:
    made = case("tanh")
    with pytest.raises(ValueError, match=f"probes={probes} must be 1 or more"):
        ggn_diagonal(
            made.model, made.batches, F.cross_entropy, estimate="monte_carlo", probes=probes
        )
    with pytest.raises(ValueError, match=f"probes={probes} must be 1 or more"):
        hessian_diagonal(
            made.model, made.batches, F.cross_entropy, estimate="hutchinson", probes=probes
        )


def test_a_linear_model_has_no_curvature_of_the_hessian_off_the_ggn() -> None:
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * (outputs - targets).square().sum()

    found = ggn_diagonal(model, [(x, y)], loss)
    torch.testing.assert_close(found["weight"], (x**2).mean(0).expand(2, 3))
    torch.testing.assert_close(found["bias"], torch.ones(2, dtype=torch.float64))
