"""Blocks against inverses of whole matrices, and against the rank-one recursion."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from sparsetrain.curvature import inverse_fisher_blocks
from sparsetrain.curvature.inverse import FisherBlocks


@given(
    samples=some.integers(1, 12),
    weights=some.integers(1, 17),
    block=some.integers(1, 20),
    damping=some.sampled_from([1e-4, 0.1, 3.0]),
    seed=some.integers(0, 100),
)
def test_blocks_are_inverses(
    samples: int, weights: int, block: int, damping: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(samples, weights, dtype=torch.float64, generator=generator)
    found = inverse_fisher_blocks(gradients, block, damping=damping)
    assert found.shape == (-(-weights // block), block, block)
    for number, start in enumerate(range(0, weights, block)):
        part = gradients[:, start : start + block]
        size = part.shape[1]
        whole = damping * torch.eye(size, dtype=torch.float64) + part.T @ part / samples
        identity = found[number, :size, :size] @ whole
        torch.testing.assert_close(
            identity, torch.eye(size, dtype=torch.float64), atol=1e-8, rtol=0
        )


def test_the_recursion_gives_the_same() -> None:
    """Singh & Alistarh 2020, eq. 6: F <- F - (F g)(F g)' / (m + g' F g)."""
    gradients = torch.randn(30, 6, dtype=torch.float64)
    inverse = torch.eye(6, dtype=torch.float64) / 0.01
    for row in gradients:
        vector = inverse @ row
        inverse = inverse - torch.outer(vector, vector) / (30 + vector @ row)
    found = inverse_fisher_blocks(gradients, 6, damping=0.01)[0]
    torch.testing.assert_close(found, inverse, rtol=1e-9, atol=1e-9)


def test_gradients_may_come_in_parts() -> None:
    gradients = torch.randn(11, 9, dtype=torch.float64)
    blocks = FisherBlocks(4)
    with pytest.raises(ValueError, match="no gradient yet"):
        blocks.inverse(0.1)
    for part in gradients.split(4):
        blocks.add(part)
    whole = inverse_fisher_blocks(gradients, 4, damping=0.1)
    torch.testing.assert_close(blocks.inverse(0.1), whole)


def test_bad_input_is_named() -> None:
    gradients = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"\[samples, weights\], not of shape \(3,\)"):
        inverse_fisher_blocks(gradients[0], 2)
    with pytest.raises(ValueError, match="block=0 must be 1 or more"):
        inverse_fisher_blocks(gradients, 0)
    with pytest.raises(ValueError, match=r"damping=0.0 must be above 0"):
        inverse_fisher_blocks(gradients, 2, damping=0.0)
    gradients[1, 1] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        inverse_fisher_blocks(gradients, 2)
