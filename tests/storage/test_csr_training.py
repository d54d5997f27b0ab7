"""Training by non-zeros is the same training as with masks."""

from __future__ import annotations

import pytest
import torch
from csr_training import EVERY_POLICY, step_of
from sparse_twins import (
    WEIGHTWISE,
    held,
    policies,
    spread,
    train,
    twins,
    wrap,
)
from torch import Tensor

LONG = 210


# Each optimizer with one policy, each policy with the two that are used most.
COMBINATIONS = sorted(
    {(EVERY_POLICY[n % 7], name) for n, name in enumerate(WEIGHTWISE)}
    | {(policy, name) for policy in EVERY_POLICY for name in ("momentum", "adamw_amsgrad")}
)


@pytest.mark.parametrize(("policy", "optimizer"), COMBINATIONS)
def test_masks_are_identical_and_losses_equal(policy: str, optimizer: str) -> None:
    masked, csr = twins(policies(LONG)[policy], optimizer, step_of, LONG)
    assert masked.step_count == csr.step_count == LONG
    assert masked.sparsity() == csr.sparsity() == pytest.approx(0.8, abs=1e-3)
    for name, target in csr.targets.items():
        other = masked.targets[name]
        for key, state in csr.state[target.param].items():
            mine = masked.state[other.param][key]
            if isinstance(state, Tensor) and state.dim():
                assert state.shape == (target.active,)
                wanted = torch.where(other.mask, mine, 0.0)
                assert torch.allclose(spread(target, state), wanted, rtol=1e-6, atol=1e-9), key
            else:
                assert float(state) == float(mine), key


@pytest.mark.parametrize("policy", EVERY_POLICY)
def test_the_same_in_float32(policy: str) -> None:
    chosen, losses = policies(100, 10)[policy], []
    for storage in ("masked", "csr"):
        model, optimizer = wrap(storage, chosen, "momentum", dtype=torch.float32)
        losses.append(train(model, optimizer, 0, 100))
        assert set(held(optimizer).values()) == {storage}
        if policy in ("static", "set", "set_grow_std"):
            assert losses[0][-10:] == pytest.approx(losses[-1][-10:], rel=0.02, abs=0.01)
    assert losses[0][:20] == pytest.approx(losses[1][:20], rel=1e-3, abs=1e-4)
