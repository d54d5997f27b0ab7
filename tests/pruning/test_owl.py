"""OWL: densities by outliers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsetrain as st


class Beside(nn.Module):
    """Blocks that all see the same inputs."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        return sum(block(x) for block in self.blocks)


def layers(outliers: list[int]) -> list[nn.Linear]:
    """Layers of 8 x 8 weights of 1, some of them 100."""
    made = [nn.Linear(8, 8, bias=False) for _ in outliers]
    for layer, count in zip(made, outliers, strict=True):
        nn.init.ones_(layer.weight)
        layer.weight.data.view(-1)[:count] = 100.0
    return made


def blocks(outliers: list[int]) -> tuple[nn.Module, Tensor]:
    """A block a layer, and inputs of 1."""
    return Beside(*layers(outliers)), torch.ones(4, 8)


def test_densities_grow_with_outliers_over_twice_the_spread() -> None:
    model, x = blocks([0, 4, 1, 2])
    found = st.owl(model, 0.7, [x], spread=0.08).densities
    raised = torch.tensor([0.0, 0.16, 0.04, 0.08], dtype=torch.float64)
    expected = raised - raised.mean() + 0.3
    assert [found[f"blocks.{i}.weight"] for i in range(4)] == pytest.approx(expected.tolist())


def test_the_whole_has_the_sparsity_whatever_the_sizes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 32), nn.Linear(32, 4))
    x = torch.randn(16, 64) * torch.logspace(-2, 2, 64)
    allocation = st.owl(model, 0.7, [x], outlier=2.0)
    assert len(set(allocation.densities.values())) == 3
    for result in (
        st.prune(model, "wanda", None, allocation=allocation, calibration=[x], scope="layer"),
        st.sparsegpt(model, None, [x], allocation=allocation),
    ):
        assert result.sparsity == pytest.approx(0.7, abs=2e-3)


def test_equal_blocks_get_equal_densities() -> None:
    model, x = blocks([2, 2])
    assert set(st.owl(model, 0.6, [x]).densities.values()) == {0.4}


def test_layers_of_a_block_share_a_density() -> None:
    made = layers([4, 0, 1, 0])
    model = Beside(Beside(*made[:2]), Beside(*made[2:]))
    found = st.owl(model, 0.7, [torch.ones(4, 8)], blocks="blocks.?").densities
    densities = list(found.values())
    assert densities[0] == densities[1] == pytest.approx(0.38)
    assert densities[2] == densities[3] == pytest.approx(0.22)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "must be in"),
        ({"outlier": 0.0}, "above 0"),
        ({"spread": 0.5}, "spread=0.5 in"),
        ({"sparsity": 0.95, "spread": 0.2}, r"blocks.0.weight a density of -0.15.*lower spread"),
        ({"calibration": []}, "got no batch"),
    ],
)
def test_bad_input_is_named(options: dict[str, Any], message: str) -> None:
    model, x = blocks([0, 4])
    given: dict[str, Any] = {"sparsity": 0.7, "calibration": [x], **options}
    with pytest.raises(ValueError, match=message):
        st.owl(model, given.pop("sparsity"), given.pop("calibration"), **given)
