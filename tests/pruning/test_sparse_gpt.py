"""SparseGPT against optimal brain surgery with an inverse for every step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import Tensor, nn

import sparsetrain as st
from sparsetrain.pruning.sequence import stages
from sparsetrain.pruning.surgeon import inverse_root, surgery
from sparsetrain.structures import NM


def problem(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """A weight and inputs that go together."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    return normal(rows, columns), normal(4 * columns, columns) @ normal(columns, columns)


def damped(x: Tensor, damping: float) -> Tensor:
    hessian = x.T @ x
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian)).to(x)


def surgery_by_inverses(weight: Tensor, mask: Tensor, hessian: Tensor) -> Tensor:
    """Remove each pruned weight from left to right, with the inverse of what is still free."""
    new = weight.clone()
    for row in range(len(weight)):
        for i in range(weight.shape[1]):
            if not mask[row, i]:
                inverse = torch.linalg.inv(hessian[i:, i:])
                new[row, i:] -= new[row, i] / inverse[0, 0] * inverse[:, 0]
                new[row, i] = 0
    return new


@given(
    rows=some.integers(1, 5),
    columns=some.sampled_from([4, 8, 12]),
    block=some.sampled_from([4, 8, 128]),
    share=some.floats(0, 1),
    seed=some.integers(0, 50),
)
def test_unstructured_surgery(rows: int, columns: int, block: int, share: float, seed: int) -> None:
    weight, x = problem(rows, columns, seed)
    keep = round(share * weight.numel())
    root = inverse_root(x.T @ x, 0.01, name="fc")
    new, mask = surgery(weight, root, keep, name="fc", block=block)
    assert int(mask.sum()) == keep
    assert not new[~mask].any()
    torch.testing.assert_close(
        new, surgery_by_inverses(weight, mask, damped(x, 0.01)), atol=1e-9, rtol=1e-9
    )


@given(n=some.integers(1, 3), block=some.sampled_from([4, 8, 128]), seed=some.integers(0, 50))
def test_n_m_surgery_does_not_depend_on_the_block(n: int, block: int, seed: int) -> None:
    weight, x = problem(3, 16, seed)
    root = inverse_root(x.T @ x, 0.01, name="fc")
    new, mask = surgery(weight, root, NM(n=n, m=4), name="fc", block=block)
    assert (mask.view(3, 4, 4).sum(2) == n).all()
    torch.testing.assert_close(
        new, surgery_by_inverses(weight, mask, damped(x, 0.01)), atol=1e-9, rtol=1e-9
    )
    whole, _ = surgery(weight, root, NM(n=n, m=4), name="fc", block=16)
    torch.testing.assert_close(new, whole)


def test_the_mask_of_a_block_is_the_authors() -> None:
    weight, x = problem(6, 8, 0)
    root = inverse_root(x.T @ x, 0.01, name="fc")
    _, mask = surgery(weight, root, 20, name="fc")
    scores = weight.square() / root.diagonal().square()
    assert scores[mask].min() > scores[~mask].max()


def test_the_root_is_that_of_the_inverse() -> None:
    _, x = problem(1, 10, 0)
    hessian = x.T @ x
    before = hessian.clone()
    root = inverse_root(hessian, 0.1, name="fc")
    torch.testing.assert_close(root.T @ root, torch.linalg.inv(damped(x, 0.1)))
    assert torch.equal(root, root.triu())
    assert torch.equal(hessian, before)


def test_a_hessian_that_needs_more_damping_gets_it() -> None:
    _, x = problem(1, 6, 0)
    hessian = x.T @ x
    eye, mean = torch.eye(6).to(x), float(hessian.diagonal().mean())
    hessian -= (float(torch.linalg.eigvalsh(hessian)[0]) + 0.02 * mean) * eye
    assert torch.linalg.cholesky_ex(hessian + 0.01 * hessian.diagonal().mean() * eye).info
    root = inverse_root(hessian, 0.01, name="fc")  # with ten times as much
    assert root.isfinite().all()
    with pytest.raises(ValueError, match=r"inputs of fc .* positive definite.* damping of 1e-06"):
        inverse_root(hessian, 1e-8, name="fc")


def error_of(model: nn.Module, weight: Tensor, x: Tensor) -> float:
    return float(((weight - model.weight.detach()) @ x.flatten(0, -2).T).square().sum())


@pytest.mark.parametrize(("sparsity", "structure"), [(0.5, "unstructured"), (None, "2:4")])
def test_kept_weights_make_up_for_pruned_ones(sparsity: Any, structure: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(32, 16)
    x = torch.randn(40, 5, 32) @ torch.randn(32, 32)
    result = st.sparsegpt(layer, sparsity, [x[:20], (x[20:], None)], structure=structure)
    assert result.sparsity == 0.5
    assert result.weights is not None
    surgeon = error_of(layer, result.weights["weight"], x)
    for score in ("wanda", "magnitude"):
        other = st.prune(
            layer, score, sparsity, calibration=[x], structure=structure, scope="layer"
        )
        masked = torch.where(other.masks["weight"], layer.weight, 0.0).detach()
        assert surgeon < 0.9 * error_of(layer, masked, x)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_is_the_linear_layer_of_its_patches(groups: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=groups).double()
    x = torch.randn(10, 4, 9, 9, dtype=torch.float64)
    result = st.sparsegpt(conv, 0.5, [x])
    assert result.weights is not None
    patches = nn.functional.unfold(x, 3, padding=1, stride=2).transpose(1, 2).flatten(0, 1)
    rows, inputs = 6 // groups, 36 // groups
    for group in range(groups):
        part = slice(rows * group, rows * (group + 1))
        own = patches[:, inputs * group : inputs * (group + 1)]
        root = inverse_root(own.T @ own, 0.01, name="conv")
        weight = conv.weight.detach()[part].flatten(1)
        expected, _ = surgery(weight, root, weight.numel() // 2, name="conv")
        torch.testing.assert_close(result.weights["weight"][part].flatten(1), expected)


def deep() -> nn.Module:
    """Three blocks in a list, a layer before and one after."""
    torch.manual_seed(0)

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(3)
            )
            self.head = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            for block in self.blocks:
                x = x + block(x)
            return self.head(x)

    return Deep()


def test_blocks_are_pruned_from_front_to_back() -> None:
    model, x = deep(), torch.randn(64, 8)
    given = st.sparsegpt(model, 0.5, [x])
    # The second block alone, on inputs that a pruned front gives.
    twin = deep()
    front = st.sparsegpt(twin, 0.5, [x], match=["first", "blocks.0.*"])
    front.apply()
    second = st.sparsegpt(twin, 0.5, [x], match="blocks.1.*")
    assert given.weights is not None and second.weights is not None
    for name, weight in second.weights.items():
        torch.testing.assert_close(given.weights[name], weight)
    other = st.sparsegpt(deep(), 0.5, [x], match="blocks.1.*").weights
    assert other is not None
    assert not torch.allclose(other["blocks.1.0.weight"], given.weights["blocks.1.0.weight"])


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ("auto", [1, 2, 2, 2, 1]),
        ("blocks", [1, 6, 1]),
        (["blocks.0", "blocks.2"], [1, 2, 2, 2, 1]),
        ("blocks.1.*", [3, 1, 1, 3]),
    ],
)
def test_stages_are_blocks_and_what_is_between(blocks: Any, expected: list[int]) -> None:
    model = deep()
    found = stages(model, st.candidates.choose(model, None), blocks)
    assert [len(stage) for stage in found] == expected


def test_nothing_changes_before_it_is_applied() -> None:
    model, x = deep(), torch.randn(64, 8)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = st.sparsegpt(model, 0.5, [x])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert result.weights is not None
    wrong = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(ValueError, match="the optimizer holds none"):
        result.hold(wrong)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    optimizer = result.hold(torch.optim.SGD(model.parameters(), lr=0.0))
    for name, weight in result.weights.items():
        assert torch.equal(model.get_parameter(name), weight)
        assert torch.equal(optimizer.masks()[name], result.masks[name])


def test_inputs_that_are_always_0_are_no_harm() -> None:
    layer, x = nn.Linear(8, 4), torch.randn(32, 8)
    x[:, 3] = 0
    result = st.sparsegpt(layer, 0.25, [x])
    assert result.weights is not None
    assert result.weights["weight"].isfinite().all()
    assert not result.weights["weight"][:, 3].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": []}, "'sparsegpt' got no batch"),
        ({"sparsity": None}, "needs a sparsity"),
        ({"sparsity": 0.7, "structure": "2:4"}, "2:4 has sparsity 0.5, not 0.7"),
        ({"structure": "constant_fan_in"}, "sparsegpt has no"),
        ({"blocks": "block.*"}, r"blocks='block.\*' names no module"),
        ({"match": "heads"}, r"match='heads' names nothing.*did you mean 'head'"),
    ],
)
def test_bad_input_is_named(options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"sparsity": 0.5, "calibration": [torch.randn(64, 8)], **options}
    with pytest.raises(ValueError, match=message):
        st.sparsegpt(deep(), given.pop("sparsity"), given.pop("calibration"), **given)


def test_an_unused_layer_is_named() -> None:
    model = deep()
    model.spare = nn.Linear(8, 8)
    with pytest.raises(ValueError, match=r"'sparsegpt' saw nothing of spare\.weight"):
        st.sparsegpt(model, 0.5, [torch.randn(64, 8)])
