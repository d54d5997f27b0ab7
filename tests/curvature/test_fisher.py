"""Fisher diagonals and per-sample gradients against autograd, one sample at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from curvature_cases import CASES, case, largest_error, slow_fisher
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrain.batches import Batch
from sparsetrain.curvature import diagonals, fisher_diagonal, layers, per_sample_gradients
from sparsetrain.evaluating import evaluating

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")
each_case = pytest.mark.parametrize("name", CASES)


@each_case
@pytest.mark.parametrize("method", ["auto", "vmap", "loop"])
def test_every_way_gives_what_a_loop_over_samples_gives(name: str, method: Any) -> None:
    made = case(name)
    found = fisher_diagonal(made.model, made.batches, F.cross_entropy, method=method)
    assert largest_error(found, slow_fisher(made, F.cross_entropy)) < 1e-12
    assert found.samples == 7
    assert found.curvature == "empirical Fisher"


@each_case
@pytest.mark.parametrize("budget", [1, 500])
def test_little_memory_gives_the_same(name: str, budget: int) -> None:
    made = case(name)
    found = fisher_diagonal(made.model, made.batches, F.cross_entropy, budget=budget)
    assert largest_error(found, slow_fisher(made, F.cross_entropy)) < 1e-12


@pytest.mark.parametrize("cached", [1, 300])
@pytest.mark.parametrize("name", ["residual", "tokens", "conv1d", "conv3d"])
def test_samples_may_be_taken_some_at_a_time(
    name: str, cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "_CACHED", cached)
    made = case(name)
    found = fisher_diagonal(made.model, made.batches, F.cross_entropy)
    assert largest_error(found, slow_fisher(made, F.cross_entropy)) < 1e-12


@each_case
def test_only_what_has_to_takes_the_long_way(name: str) -> None:
    made = case(name)
    sums = diagonals.SquareSums(made.model, dict(made.model.named_parameters()), "auto", 1 << 20)
    with evaluating(made.model):
        batch = Batch((made.x,), {}, made.y, len(made.x))
        sums.add(batch, lambda outputs, targets: [diagonals.Pass(F.cross_entropy, targets)])
    assert set(sums.slow or {}) == set(made.slow)


@pytest.mark.parametrize("samples", [1, 2, 3])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_dimension_as_long_as_the_batch_does_not_pass_for_it(samples: int, steps: int) -> None:
    made = case("time_first")
    x = torch.randn(samples, steps, 6, dtype=torch.float64)
    made = made._replace(x=x, y=made.y[:samples])
    found = fisher_diagonal(made.model, [(x, made.y)], F.cross_entropy)
    assert largest_error(found, slow_fisher(made, F.cross_entropy)) < 1e-12


class Changeable(nn.Module):
    """Puts the samples along another dimension for one size of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 4:
            return self.head(torch.relu(self.inner(x.transpose(0, 1))).mean(0))
        return self.head(torch.relu(self.inner(x)).mean(1))


@pytest.mark.parametrize("sizes", [(3, 4, 3), (4, 3, 3), (3, 3, 4)])
def test_a_short_way_may_end_with_a_later_batch(sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x = Changeable().double(), torch.randn(10, 5, 6, dtype=torch.float64)
    made = case("time_first")._replace(model=model, x=x, y=torch.randint(3, (10,)))
    batches = list(zip(x.split(sizes), made.y.split(sizes), strict=True))
    found = fisher_diagonal(model, batches, F.cross_entropy)
    assert largest_error(found, slow_fisher(made, F.cross_entropy)) < 1e-12


@each_case
@pytest.mark.parametrize("method", ["vmap", "loop"])
def test_per_sample_gradients_are_those_of_each_sample(name: str, method: Any) -> None:
    made = case(name)
    found = per_sample_gradients(made.model, made.batches, F.cross_entropy, method=method)
    made.model.eval()
    for i in range(len(made.x)):
        made.model.zero_grad()
        F.cross_entropy(made.model(made.x[i : i + 1]), made.y[i : i + 1]).backward()
        for key, parameter in made.model.named_parameters():
            right = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(found[key][i], right)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(reduction="sum"), nn.CrossEntropyLoss()])
def test_a_mean_and_a_sum_over_the_batch_are_the_same(loss: nn.Module) -> None:
    made = case("mlp")
    found = fisher_diagonal(made.model, made.batches, loss)
    assert largest_error(found, slow_fisher(made, F.cross_entropy)) < 1e-12


def test_class_weights_count_for_each_sample_by_itself() -> None:
    made = case("mlp")
    loss = nn.CrossEntropyLoss(weight=torch.rand(4, dtype=torch.float64), reduction="sum")
    found = fisher_diagonal(made.model, made.batches, loss)
    assert largest_error(found, slow_fisher(made, loss)) < 1e-12
    assert largest_error(found, slow_fisher(made, F.cross_entropy)) > 0.1


def test_a_loss_that_branches_on_values_is_taken_sample_by_sample() -> None:
    made = case("mlp")

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        values = F.cross_entropy(outputs, targets)
        return values * 2 if float(values.detach()) > 1 else values

    found = fisher_diagonal(made.model, made.batches, loss)
    assert largest_error(found, slow_fisher(made, loss)) < 1e-12


def test_outputs_may_be_more_than_a_tensor() -> None:
    made = case("mlp")

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = made.model

        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"logits": self.inner(x), "name": "kept"}

    def loss(outputs: dict[str, Any], targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs["logits"], targets)

    found = fisher_diagonal(Wrapped(), made.batches, loss)
    right = {f"inner.{k}": v for k, v in slow_fisher(made, F.cross_entropy).items()}
    assert largest_error(found, right) < 1e-12


def test_labels_of_the_model_give_the_fisher_matrix() -> None:
    made = case("mlp")
    probabilities = made.model(made.x).detach().softmax(1)
    right: dict[str, Tensor] = {}
    for label in range(4):  # the exact expectation over labels
        labelled = made._replace(y=torch.full((7,), label))
        grads = per_sample_gradients(labelled.model, labelled.batches, F.cross_entropy)
        for name, g in grads.items():
            weight = probabilities[:, label].reshape(-1, *[1] * (g.dim() - 1))
            right[name] = right.get(name, 0) + (weight * g**2).mean(0)
    found = fisher_diagonal(made.model, made.batches * 500, F.cross_entropy, labels="model")
    assert largest_error(found, right) < 0.1
    empirical = fisher_diagonal(made.model, made.batches, F.cross_entropy)
    assert largest_error(dict(empirical), right) > 0.2
    assert found.curvature == "Fisher, labels drawn from the model"


def test_labels_drawn_depend_on_the_seed_alone() -> None:
    made = case("mlp")

    def draw(seed: int) -> dict[str, Tensor]:
        return fisher_diagonal(made.model, made.batches, F.cross_entropy, labels="model", seed=seed)

    assert largest_error(draw(0), draw(0)) == 0
    assert largest_error(draw(0), draw(1)) > 0.01


def test_only_named_parameters_are_computed() -> None:
    made = case("residual")
    right = slow_fisher(made, F.cross_entropy)
    names = ["grouped.weight", "norm.bias"]
    found = fisher_diagonal(made.model, made.batches, F.cross_entropy, parameters=names)
    assert largest_error(found, {name: right[name] for name in names}) < 1e-12
    with pytest.raises(ValueError, match=r"'grouped.weigt'.*did you mean 'grouped.weight'"):
        fisher_diagonal(made.model, made.batches, F.cross_entropy, parameters=["grouped.weigt"])


def test_frozen_parameters_are_left_out_unless_named() -> None:
    made = case("mlp")
    made.model[0].requires_grad_(False)
    found = fisher_diagonal(made.model, made.batches, F.cross_entropy)
    assert set(found) == {"2.weight", "2.bias"}
    named = fisher_diagonal(made.model, made.batches, F.cross_entropy, parameters=["0.weight"])
    made.model[0].requires_grad_(True)
    assert (
        largest_error(
            {**named, **found},
            {k: v for k, v in slow_fisher(made, F.cross_entropy).items() if k != "0.bias"},
        )
        < 1e-12
    )


@each_case
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(name: str, fails: bool) -> None:
    made = case(name)
    model = made.model.train()
    next(iter(model.modules())).eval()  # a mixture of modes
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 3.0)
    modes = [module.training for module in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    hooks = [len(module._forward_hooks) for module in model.modules()]
    y = made.y.double() / 0 if fails else made.y
    if fails:
        with pytest.raises(ValueError, match="the loss of sample 0 of a batch of"):
            fisher_diagonal(model, [(made.x, y)], lambda o, t: o.sum() * t.sum())
    else:
        fisher_diagonal(model, made.batches, F.cross_entropy)
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in parameters] == [False] + [True] * (len(parameters) - 1)
    assert all((p.grad == 3.0).all() for p in parameters)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
