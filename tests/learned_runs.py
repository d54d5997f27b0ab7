"""Learned policies over the small network of `runs.py`: what their tests share."""

from __future__ import annotations

from typing import Any

import torch
from runs import SmallNet, batch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsetrain as st

STEPS = 60
_ASKED: dict[str, Any] = {"sparsity": 0.7, "total_steps": STEPS, "update": {"every": 3}}
#: Asked for a sparsity of 70 %.
STEERED: dict[str, st.Policy] = {
    "soft_threshold": st.SoftThreshold(**_ASKED),
    "soft_threshold_per_output": st.SoftThreshold(**_ASKED, per="output", curve="exponential"),
    "hard_concrete": st.HardConcrete(**_ASKED),
    "hard_concrete_inputs": st.HardConcrete(**_ASKED, per="input"),
    "gumbel_softmax": st.GumbelSoftmax(**_ASKED),
    "gumbel_softmax_soft": st.GumbelSoftmax(**_ASKED, hard=False),
    "variational_dropout": st.VariationalDropout(**_ASKED),
    "movement": st.Movement(**_ASKED),
    "movement_global": st.Movement(**_ASKED, allocation="global"),
    "soft_movement": st.Movement(**_ASKED, mode="threshold", allocation="global"),
}
#: With a strength of their own, and other options.
NATIVE: dict[str, st.Policy] = {
    "soft_threshold": st.SoftThreshold(strength=0.5, initial=-4.0),
    "hard_concrete": st.HardConcrete(strength=1e-3, l2=0.1),
    "hard_concrete_examples": st.HardConcrete(strength=1e-3, per="output", sampling="example"),
    "hard_concrete_input_examples": st.HardConcrete(strength=1e-3, per="input", sampling="example"),
    "gumbel_softmax": st.GumbelSoftmax(strength=1e-3, total_steps=STEPS),
    "two_of_four": st.GumbelSoftmax(structure="2:4", total_steps=STEPS),
    "variational_dropout": st.VariationalDropout(strength=1e-3, total_steps=STEPS, warm_up=0.2),
    "weight_noise": st.VariationalDropout(strength=1e-3, warm_up=0.0, local=False),
    "soft_movement": st.Movement(mode="threshold", strength=1e-3, total_steps=STEPS),
}
ALL = {**{f"steered {k}": p for k, p in STEERED.items()}, **NATIVE}


def wrap(
    policy: Any, seed: int = 0, optimizer: str = "adam"
) -> tuple[SmallNet, st.SparseOptimizer]:
    """A fresh network and its wrapped optimizer."""
    model = SmallNet(seed)
    base: torch.optim.Optimizer = (
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        if optimizer == "sgd"
        else torch.optim.AdamW(model.parameters(), lr=0.01)
    )
    return model, st.SparseOptimizer(base, model, policy, seed=seed)


def train(model: nn.Module, optimizer: st.SparseOptimizer, first: int, last: int) -> None:
    """Steps first to last - 1; the noise of a step depends on its number alone."""
    for step in range(first, last):
        x, y = batch(step)
        torch.manual_seed(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def answers(model: nn.Module) -> Tensor:
    """Outputs of evaluation on some inputs."""
    model.eval()
    with torch.no_grad():
        return model(torch.cat([batch(step)[0] for step in range(200, 204)]))
