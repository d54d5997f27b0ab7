"""ThiNet and LASSO against brute force, and what they leave on a real layer."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from channels_networks import Residual, images
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor, nn

import sparsetrain as st
from sparsetrain.calibration import Calibration
from sparsetrain.channels.reconstruction import (
    greedy_discard,
    lasso_path,
    least_squares,
    matching_pursuit,
    solved,
)
from sparsetrain.channels.rows import sampled_rows


def table(seed: int, rows: int = 30, columns: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(rows, columns, generator=generator, dtype=torch.float64) @ mixed
    return x, x.sum(1)


def fitted_error(x: Tensor, y: Tensor) -> float:
    return float((y - x @ torch.linalg.lstsq(x, y.unsqueeze(1)).solution.squeeze(1)).norm())


@settings(max_examples=30, deadline=None)
@given(seed=some.integers(0, 10_000), count=some.integers(0, 6))
def test_greedy_discarding_is_greedy(seed: int, count: int) -> None:
    x, _ = table(seed)
    taken: list[int] = []
    for _ in range(count):  # the sum over rows of squares, as in the paper
        cost = {j: float(x[:, [*taken, j]].sum(1).norm()) for j in range(6) if j not in taken}
        taken.append(min(cost, key=cost.__getitem__))
    assert greedy_discard(x, count) == taken


@settings(max_examples=30, deadline=None)
@given(seed=some.integers(0, 10_000), count=some.integers(0, 6))
def test_matching_pursuit_takes_the_best_fit_of_the_residual(seed: int, count: int) -> None:
    x, y = table(seed)
    taken: list[int] = []
    for _ in range(count):
        rest = y - x[:, taken] @ torch.linalg.lstsq(x[:, taken], y.unsqueeze(1)).solution[:, 0]
        rest = rest if taken else y
        errors = {j: fitted_error(x[:, [j]], rest) for j in range(6) if j not in taken}
        taken.append(min(errors, key=errors.__getitem__))
    assert matching_pursuit(x, y, count) == taken


def test_inputs_that_add_nothing_are_left_out() -> None:
    x, _ = table(0)
    x[:, [1, 4]] = 0
    y = x.sum(1)
    assert sorted(greedy_discard(x, 2)) == [1, 4]
    assert sorted(matching_pursuit(x, y, 4)) == [0, 2, 3, 5]
    assert lasso_path(x, y, 4, seed=0) == [0, 2, 3, 5]


@pytest.mark.parametrize("count", range(1, 7))
def test_lasso_keeps_exactly_as_many(count: int) -> None:
    for seed in range(8):
        x, y = table(seed)
        kept = lasso_path(x, y, count, seed=0)
        assert len(set(kept)) == count and kept == sorted(kept)


def test_lasso_is_near_the_best_subset() -> None:
    ratios = []
    for seed in range(20):
        x, y = table(seed)
        errors = {
            subset: fitted_error(x[:, list(subset)], y)
            for subset in itertools.combinations(range(6), 3)
        }
        ratios.append(errors[tuple(lasso_path(x, y, 3, seed=0))] / min(errors.values()))
    assert min(ratios) == pytest.approx(1)
    assert sorted(ratios)[10] < 1.5


def test_equal_inputs_break_no_count() -> None:
    x, _ = table(0)
    x[:, 3] = x[:, 2]
    x[:, 5] = x[:, 2]
    for count in range(1, 6):
        assert len(lasso_path(x, x.sum(1), count, seed=0)) == count
        assert len(set(matching_pursuit(x, x.sum(1), count))) == count


@pytest.mark.parametrize("intercept", [True, False])
def test_least_squares_is_that_of_lapack(intercept: bool) -> None:
    x, _ = table(1)
    y = torch.randn(30, 4, dtype=torch.float64) + 3
    weight, bias = least_squares(x, y, intercept=intercept)
    full = torch.cat([x, torch.ones(30, 1, dtype=torch.float64)], 1) if intercept else x
    right = torch.linalg.lstsq(full, y).solution
    torch.testing.assert_close(weight, right[:6].T)
    torch.testing.assert_close(bias, right[6] if intercept else torch.zeros_like(bias))


def test_singular_systems_have_the_shortest_solution() -> None:
    x, y = table(0)
    x[:, 1] = x[:, 0]
    found = solved(x.T @ x, x.T @ y)
    torch.testing.assert_close(found, torch.linalg.pinv(x) @ y, rtol=1e-6, atol=1e-8)
    assert found[0] == pytest.approx(float(found[1]))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 3, 3, padding=1),
        nn.Conv2d(4, 3, 2, stride=2, bias=False),
        nn.Conv2d(4, 3, 3, padding="same", padding_mode="reflect", dilation=2),
        nn.Conv1d(4, 3, 3),
        nn.Linear(4, 3),
    ],
)
def test_rows_are_inputs_and_outputs_of_the_layer(layer: Any) -> None:
    first = {nn.Conv1d: nn.Conv1d, nn.Linear: nn.Linear}.get(type(layer), nn.Conv2d)
    options = {} if first is nn.Linear else {"kernel_size": 1}
    torch.manual_seed(0)
    model = nn.Sequential(first(2, 4, **options), nn.Tanh(), layer)
    shape = {nn.Conv1d: (5, 2, 9), nn.Linear: (5, 7, 2)}.get(type(layer), (5, 2, 8, 8))
    x = torch.randn(shape)
    (coupling,) = st.channels.couplings(model, x)
    (side,) = coupling.by_role("in")
    given_data = Calibration([(x[:3], None), (x[3:], None)], None, None, 0, False)
    rows = sampled_rows(model, [side], given_data, "test", places=4)["2"]
    assert rows.inputs.shape[:2] == (20, 4) and rows.outputs.shape == (20, 3)
    parts = rows.contributions(layer.weight.detach(), side)
    torch.testing.assert_close(parts.sum(2), rows.outputs, rtol=1e-4, atol=1e-5)
    again = sampled_rows(model, [side], given_data, "test", places=4)["2"]
    assert again.outputs.equal(rows.outputs)
    assert len(rows.outputs.unique(dim=0)) == 20


def test_a_fit_gives_inputs_that_hardly_vary_no_large_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 4, generator=generator)
    x[:, 3] = 1e-5 * torch.randn(200, generator=generator)  # a unit that is next to dead
    noise = 0.1 * torch.randn(200, 1, generator=generator)
    weight, _ = least_squares(x, x[:, :3].sum(1, keepdim=True) + noise, intercept=True)
    assert weight.abs().max() < 2


def trained() -> tuple[nn.Module, Tensor]:
    """A network whose second layer has twenty inputs that go together."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 20, 3), nn.ReLU(), nn.Conv2d(20, 8, 3), nn.ReLU())
    model.append(nn.Flatten()).append(nn.Linear(8 * 16, 3))
    return model, torch.randn(64, 1, 8, 8)


@torch.no_grad()
def error_after(method: Any, keep: float) -> float:
    model, x = trained()
    ratio = {"0": 1 - keep}
    result = st.channels.prune(model, x[:1], method, ratio, calibration=[(x, None)])
    right, found = model[:3](x), result.model[:3](x)
    return float((found - right).norm() / right.norm())


def test_rebuilding_changes_the_next_layer_s_outputs_less() -> None:
    methods = {
        "lasso": {"kind": "lasso", "places": 16},
        "keep": {"kind": "thinet", "places": 16},
        "discard": {"kind": "thinet", "greedy": "discard", "places": 16},
        "l1": "l1",
        "random": "random",
    }
    errors = {name: error_after(method, 0.5) for name, method in methods.items()}
    assert errors["lasso"] < errors["keep"] < errors["l1"]
    assert errors["discard"] < errors["random"]


@pytest.mark.parametrize("method", ["thinet", "lasso"])
def test_a_network_of_channels_that_are_not_needed_loses_nothing(method: str) -> None:
    model, x = trained()
    with torch.no_grad():
        if method == "thinet":  # channels that are there twice: one gets a factor of two
            model[0].weight[10:] = model[0].weight[:10]
            model[0].bias[10:] = model[0].bias[:10]
            model[2].weight[:, 10:] = model[2].weight[:, :10]
        else:
            model[2].weight[:, 3:13] = 0
    smaller = st.channels.prune(model, x[:1], method, {"0": 0.5}, calibration=[(x, None)]).model
    torch.testing.assert_close(smaller(x), model(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["thinet", "lasso"])
def test_all_layers_one_after_the_other(method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*trained()[0])
    x = trained()[1]
    result = st.channels.prune(model, x[:1], method, 0.5, calibration=[(x, None)])
    assert result.layers == {"0": (20, 10), "2": (8, 4)}
    shrunk = nn.Sequential(*trained()[0])
    optimizer = torch.optim.SGD(shrunk.parameters(), lr=0.1)
    options = {"calibration": [(x, None)], "optimizer": optimizer, "in_place": True}
    st.channels.prune(shrunk, x[:1], method, 0.5, **options)
    torch.testing.assert_close(shrunk(x), result.model(x))


@pytest.mark.parametrize("method", ["thinet", "lasso"])
def test_what_rebuilding_cannot_do(method: str) -> None:
    model = Residual()
    with pytest.raises(ValueError, match=f"channel method '{method}'"):
        st.channels.prune(model, images(), method, {"stem": 0.5})
    with pytest.raises(ValueError, match="cannot be done for grouped"):
        st.channels.prune(model, images(), method, {"inner": 0.5}, calibration=[(images(), None)])
    with pytest.raises(ValueError, match="layer by layer"):
        st.channels.prune(model, images(), method, scope="global", calibration=[(images(), None)])
