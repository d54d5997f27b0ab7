"""Every policy and a training loop, on the test kit's small network: what tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsetrain as st
from sparsetrain import testing
from sparsetrain.testing import SmallNet, batch

#: AdamW has two entries of its own, which this one would only repeat.
OPTIMIZERS = {name: make for name, make in testing.OPTIMIZERS.items() if name != "adamw"}

STEPS = testing.STEPS
_DYNAMIC: dict[str, Any] = {"total_steps": STEPS, "update": {"every": 3}}
POLICIES: dict[str, st.Policy] = {
    "static": st.Static(sparsity=0.8),
    "set": st.SET(sparsity=0.8, **_DYNAMIC),
    "rigl": st.RigL(sparsity=0.8, **_DYNAMIC),
    "snfs": st.SNFS(sparsity=0.8, **_DYNAMIC),
    "gradual": st.Gradual(sparsity=0.8, **_DYNAMIC),
    "dynamic_network_surgery": st.DynamicNetworkSurgery(sparsity=0.8, total_steps=STEPS),
    "nm_sparse": st.NMSparse(n=1, m=4),
}
LATENT = ("dynamic_network_surgery", "nm_sparse")


def wrap(
    optimizer: str, policy: st.Policy | str, seed: int = 0
) -> tuple[SmallNet, st.SparseOptimizer]:
    """A fresh network and its wrapped optimizer."""
    model = SmallNet(seed)
    chosen = POLICIES[policy] if isinstance(policy, str) else policy
    return model, st.SparseOptimizer(
        OPTIMIZERS[optimizer](model.parameters()), model, chosen, seed=seed
    )


def backward(model: nn.Module, step: int) -> Tensor:
    """Gradients of one step's batch."""
    x, y = batch(step)
    model.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[float]:
    """Steps first to last - 1; returns the losses."""
    losses = []
    base = getattr(optimizer, "base", optimizer)
    for step in range(first, last):
        if isinstance(base, torch.optim.LBFGS):
            loss = optimizer.step(lambda step=step: backward(model, step))
            losses.append(float(loss.detach()))
        else:
            losses.append(float(backward(model, step).detach()))
            optimizer.step()
    return losses


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of everything the model holds."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two state dicts are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def shaped_state(optimizer: torch.optim.Optimizer, param: Tensor) -> dict[str, Tensor]:
    """State tensors of a weight that hold one number a weight."""
    state = optimizer.state.get(param, {})
    return {k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == param.shape}
