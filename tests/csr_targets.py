"""What tests of a target in csr storage share."""

from __future__ import annotations

from typing import Any

import torch
from sparse_twins import dense_weight, pair, spread
from torch import Tensor, nn

from sparsetrain.base_state import carry_state
from sparsetrain.storage.csr.target import CsrTarget
from sparsetrain.storage.masked import MaskedTarget

NAME = "hidden.weight"


def brute_largest(matrix: Tensor, count: int, taken: set[int]) -> list[int]:
    """By a full sort: the largest first, of equal ones the lower index."""
    flat = matrix.abs().view(-1).tolist()
    free = [i for i in range(len(flat)) if i not in taken]
    return sorted(sorted(free, key=lambda i: (-flat[i], i))[:count])


class Pair:
    """One weight held both ways, with gradient and optimizer state at its active places."""

    def __init__(self, shape: tuple[int, int], active: list[int], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        mask = torch.zeros(shape, dtype=torch.bool)
        mask.view(-1)[active] = True
        dense = nn.Linear(shape[1], shape[0], bias=False, dtype=torch.float64)
        with torch.no_grad():
            dense.weight.copy_(torch.randn(shape, generator=generator))
        dense, sparse = pair(dense, mask)
        masked = MaskedTarget(NAME, dense.weight)
        masked.replace_mask(mask)
        self.targets: list[Any] = [masked, CsrTarget(NAME, sparse)]
        self.bases = [torch.optim.Adam([t.param]) for t in self.targets]
        state, gradient = (torch.randn(shape, generator=generator).double() for _ in range(2))
        for base, target in zip(self.bases, self.targets, strict=True):
            here = mask.view(-1).nonzero().view(-1)
            by_weight = [torch.where(mask, t, 0.0) for t in (state, gradient)]
            if isinstance(target, CsrTarget):
                by_weight = [t.view(-1)[here] for t in by_weight]
            base.state[target.param] = {
                "exp_avg": by_weight[0].clone(),
                "step": torch.tensor(3.0),
                "note": "kept",
            }
            target.param.grad = by_weight[1].clone()

    def exchange(self, *args: Any, fresh: float = 0.0) -> list[tuple[Tensor, Tensor]]:
        return [
            carry_state(base, target, lambda t=target: t.exchange(*args), {"exp_avg": fresh})
            for base, target in zip(self.bases, self.targets, strict=True)
        ]

    def check(self) -> None:
        masked, csr = self.targets
        assert torch.equal(masked.mask, csr.mask)
        assert masked.active == csr.active == csr.param.numel()
        assert torch.equal(masked.active_indices(), csr.active_indices())
        assert torch.equal(dense_weight(masked), dense_weight(csr))
        assert csr.param is csr.layer.values and csr.param.requires_grad
        held, values = (base.param_groups[0]["params"] for base in self.bases)
        assert held == [masked.param] and values[0] is csr.param and len(values) == 1
        states = [base.state[t.param] for base, t in zip(self.bases, self.targets, strict=True)]
        assert all(len(base.state) == 1 for base in self.bases)
        assert torch.equal(states[0]["exp_avg"], spread(csr, states[1]["exp_avg"]))
        assert states[1]["step"] == 3.0 and states[1]["note"] == "kept"
