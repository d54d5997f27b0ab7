"""A small network, every optimizer and every policy, and a training loop: what tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsetrain as st

OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, foreach=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=1e-3),
    "adamw_amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.9),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, initial_accumulator_value=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.05),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3, history_size=4),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["muon"] = lambda p: torch.optim.Muon([q for q in p if q.dim() == 2], lr=0.01)

STEPS = 14
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


class SmallNet(nn.Module):
    """A convolution, a norm and two linear layers; takes [N, 4, 4, 4], gives [N, 3]."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(4, 8, 3)
            self.norm = nn.BatchNorm2d(8)
            self.hidden = nn.Linear(32, 16)
            self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        return self.head(F.relu(self.hidden(x.flatten(1))))


def batch(step: int) -> tuple[Tensor, Tensor]:
    """The batch of a step, always the same."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(8, 4, 4, 4, generator=generator)
    return x, torch.randint(0, 3, (8,), generator=generator)


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
