"""Each score against its formula, weight by weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import Tensor, nn

import sparsetrain as st

numbers = some.floats(-1e3, 1e3, width=32)
rows = some.integers(1, 4).flatmap(
    lambda width: some.lists(
        some.lists(numbers, min_size=width, max_size=width), min_size=1, max_size=4
    )
)


def weight(values: list[list[float]], gradient: list[list[float]] | None = None) -> nn.Parameter:
    param = nn.Parameter(torch.tensor(values))
    if gradient is not None:
        param.grad = torch.tensor(gradient)
    return param


def score(
    which: st.Score, param: nn.Parameter, state: dict[str, Any] | None = None, seed: int = 0
) -> Tensor:
    return which.of("encoder.fc", param, state or {}, torch.Generator().manual_seed(seed))


def check(found: Tensor, expected: list[list[float]]) -> None:
    assert not found.requires_grad
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=0)


@given(values=rows)
def test_magnitude(values: list[list[float]]) -> None:
    check(score(st.Magnitude(), weight(values)), [[abs(w) for w in row] for row in values])


@given(values=rows)
def test_gradient(values: list[list[float]]) -> None:
    param = weight([[1.0] * len(row) for row in values], gradient=values)
    check(score(st.Gradient(), param), [[abs(g) for g in row] for row in values])


@given(values=rows, data=some.data())
def test_taylor(values: list[list[float]], data: some.DataObject) -> None:
    gradient = [[data.draw(numbers) for _ in row] for row in values]
    pairs = [zip(a, b, strict=True) for a, b in zip(values, gradient, strict=True)]
    expected = [[abs(w * g) for w, g in row] for row in pairs]
    check(score(st.Taylor(), weight(values, gradient)), expected)


def test_taylor_is_the_change_of_a_linear_loss() -> None:
    param = weight([[0.5, -2.0], [3.0, 0.0]])
    slopes = torch.tensor([[1.0, 4.0], [-2.0, 5.0]])
    loss = (param * slopes).sum()
    loss.backward()
    for index in torch.cartesian_prod(torch.arange(2), torch.arange(2)).tolist():
        without = param.detach().clone()
        without[tuple(index)] = 0
        change = (loss - (without * slopes).sum()).abs()
        assert score(st.Taylor(), param)[tuple(index)] == change


@given(values=rows)
@pytest.mark.parametrize("key", ["momentum_buffer", "exp_avg"])
def test_momentum(key: str, values: list[list[float]]) -> None:
    state = {key: torch.tensor(values), "step": torch.tensor(3.0)}
    found = score(st.Momentum(), weight([[1.0] * len(row) for row in values]), state)
    check(found, [[abs(m) for m in row] for row in values])


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.9),
        lambda p: torch.optim.Adam(p, lr=0.0),
        lambda p: torch.optim.NAdam(p, lr=0.0),
        lambda p: torch.optim.Adamax(p, lr=0.0),
        lambda p: torch.optim.RMSprop(p, lr=0.0, momentum=0.9),
    ],
)
def test_momentum_of_an_optimizer_ranks_like_the_running_mean(make: Any) -> None:
    param = weight([[1.0, 2.0, 3.0]])
    optimizer = make([param])
    for _ in range(2):
        param.grad = torch.tensor([[0.0, -3.0, 1e-12]])
        optimizer.step()
    found = score(st.Momentum(), param, optimizer.state[param])
    assert found.argsort().tolist() == [[0, 2, 1]]


@given(seed=some.integers(0, 2**32))
def test_random_uses_only_the_generator_it_is_given(seed: int) -> None:
    param = weight([[1.0, -2.0, 0.0], [4.0, 5.0, 6.0]])
    before = torch.get_rng_state()
    found = score(st.Random(), param, seed=seed)
    assert torch.equal(torch.get_rng_state(), before)
    expected = torch.rand(2, 3, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(found, expected)
    assert torch.equal(found, score(st.Random(), weight([[0.0] * 3] * 2), seed=seed))


def test_random_goes_on_from_one_layer_to_the_next() -> None:
    generator = torch.Generator().manual_seed(0)
    param = weight([[0.0] * 50])
    first = st.Random().of("a", param, {}, generator)
    second = st.Random().of("b", param, {}, generator)
    assert not torch.equal(first, second)
    assert ((first >= 0) & (first < 1)).all()


@pytest.mark.parametrize("which", [st.Gradient(), st.Taylor()])
def test_a_missing_gradient_names_layer_and_score(which: st.Score) -> None:
    with pytest.raises(ValueError, match=rf"'{which.kind}' .* encoder\.fc: call backward"):
        score(which, weight([[1.0]]))


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"momentum_buffer": None},
        {"exp_avg_sq": torch.ones(1, 2)},
        {"exp_avg": torch.ones(2)},
        {"mu": torch.tensor(0.9), "mu_product": torch.tensor(0.9)},
    ],
)
def test_a_missing_momentum_names_the_layer(state: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"no momentum of encoder\.fc"):
        score(st.Momentum(), weight([[1.0, 2.0]]), state)


def test_errors_reach_the_user_with_the_layers_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    for which in (st.Gradient(), st.Taylor(), st.Momentum()):
        with pytest.raises(ValueError, match=r"0\.weight"):
            st.SparseOptimizer(base, model, st.Static(sparsity=0.5, score=which))


@pytest.mark.parametrize("which", [st.Magnitude(), st.Gradient(), st.Taylor(), st.Momentum()])
def test_scores_change_neither_weight_nor_gradient_nor_state(which: st.Score) -> None:
    param = weight([[-1.0, 2.0]], gradient=[[3.0, -4.0]])
    state = {"momentum_buffer": torch.tensor([[-5.0, 6.0]])}
    found = score(which, param, state)
    found.fill_(7.0)  # a caller may overwrite what it was given
    assert param.tolist() == [[-1.0, 2.0]]
    assert param.grad.tolist() == [[3.0, -4.0]]
    assert state["momentum_buffer"].tolist() == [[-5.0, 6.0]]


@pytest.mark.parametrize("kind", ["magnitude", "gradient", "momentum", "random", "taylor"])
def test_scores_by_name(kind: str) -> None:
    policy = st.Static(sparsity=0.5, score=kind)
    assert type(policy.score).__name__.lower() == kind
    assert policy == st.Static(sparsity=0.5, score={"kind": kind})


def test_movement_adds_up_over_steps() -> None:
    movement, seen = st.MovementScore(), None
    expected = torch.zeros(2, 3)
    for step in range(4):
        param = weight(torch.randn(2, 3).tolist(), torch.randn(2, 3).tolist())
        assert param.grad is not None
        if step == 2:
            param.grad[0, 1] = torch.nan  # one bad batch does not stay for good
        expected -= torch.nan_to_num(param.detach() * param.grad)
        seen = movement.observe("fc", param, seen)
    found = score(movement, param, {"sparsetrain.accumulated": seen})
    torch.testing.assert_close(found, expected)


def test_movement_of_one_step_alone() -> None:
    param = weight([[2.0, -1.0]], [[0.5, 0.5]])
    check(score(st.MovementScore(), param), [[-1.0, 0.5]])
    unused = weight([[2.0]])
    assert st.MovementScore().observe("fc", unused, None) is None
    with pytest.raises(ValueError, match=r"'movement' needs the gradient of encoder\.fc"):
        score(st.MovementScore(), unused)


def test_gradual_pruning_by_movement() -> None:
    """The weights that moved towards 0 go first, and the sums are in the checkpoint."""
    layer = nn.Linear(4, 2, bias=False)
    layer.weight.data.fill_(1.0)
    policy = st.Gradual(
        sparsity=0.5, total_steps=8, score="movement", update={"every": 4, "start": 3, "stop": 4}
    )
    optimizer = st.SparseOptimizer(torch.optim.SGD(layer.parameters(), lr=0.01), layer, policy)
    pull = torch.tensor([[1.0, -1.0, 2.0, -2.0], [-1.0, 1.0, -2.0, 2.0]])
    for _ in range(3):
        optimizer.zero_grad()
        (layer.weight * pull).sum().backward()
        optimizer.step()
    saved = optimizer.state_dict()["sparsetrain"]["memories"][0]["weight.seen"]
    torch.testing.assert_close(saved, -sum((1 - 0.01 * k * pull) * pull for k in range(3)))
    optimizer.zero_grad()
    (layer.weight * pull).sum().backward()
    optimizer.step()
    assert torch.equal(optimizer.masks()["weight"], pull < 0)


def test_scores_that_add_up_need_dense_weights() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    policy = st.Gradual(sparsity=0.9, total_steps=10, score="movement", initial_sparsity=0.9)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = st.SparseOptimizer(base, model, policy, storage="csr")
    (row,) = optimizer.summary().rows
    assert row.storage == "masked" and "sum over steps" in row.why
