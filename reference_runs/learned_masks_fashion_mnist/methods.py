"""The methods that are compared: a policy and the optimizer under it.

All share one training recipe, that of `lenet_fashion_mnist`, but for variational dropout. Its
regulariser has gradients of 1/w, for which its paper uses Adam, and it needs more epochs than the
others (the paper: 200).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

import sparsetrain as st

Optimizers = Callable[[Iterable[Tensor], str], torch.optim.Optimizer]
#: Of SGD; at 0.1 LeNet-5 diverges now and then, sparse or not.
RATES = {"lenet_300_100": 0.1, "lenet_5": 0.03}


def sgd(parameters: Iterable[Tensor], network: str) -> torch.optim.Optimizer:
    """Nesterov's momentum, as in `lenet_fashion_mnist`."""
    rate = RATES[network]
    return torch.optim.SGD(parameters, lr=rate, momentum=0.9, nesterov=True, weight_decay=1e-4)


def adam(parameters: Iterable[Tensor], network: str) -> torch.optim.Optimizer:
    """Adam for variational dropout."""
    return torch.optim.Adam(parameters, lr=2e-3)


@dataclass(frozen=True)
class Method:
    """A policy at a sparsity, and how it trains.

    Attributes:
        policy: (sparsity, steps) -> policy, or None for dense training.
        longer: epochs as a multiple of the others'.
    """

    label: str
    policy: Callable[[float, int], st.Policy] | None
    optimizer: Optimizers = sgd
    longer: int = 1


def _gradual(sparsity: float, steps: int) -> st.Policy:
    update = st.UpdateSchedule(every=100, start=round(0.1 * steps))
    return st.Gradual(sparsity=sparsity, total_steps=steps, update=update)


def _rigl(sparsity: float, steps: int) -> st.Policy:
    drop = st.Schedule(shape="cosine", initial=0.3, final=0.0)
    return st.RigL(sparsity=sparsity, total_steps=steps, drop_fraction=drop)


def _static(sparsity: float, steps: int) -> st.Policy:
    return st.Static(sparsity=sparsity)


def _str(sparsity: float, steps: int) -> st.Policy:
    return st.SoftThreshold(sparsity=sparsity, total_steps=steps)


def _hard_concrete(sparsity: float, steps: int) -> st.Policy:
    return st.HardConcrete(sparsity=sparsity, total_steps=steps)


def _gumbel_softmax(sparsity: float, steps: int) -> st.Policy:
    return st.GumbelSoftmax(sparsity=sparsity, total_steps=steps)


def _variational_dropout(sparsity: float, steps: int) -> st.Policy:
    return st.VariationalDropout(sparsity=sparsity, total_steps=steps)


def _movement(sparsity: float, steps: int) -> st.Policy:
    return st.Movement(sparsity=sparsity, total_steps=steps, allocation="global")


def _soft_movement(sparsity: float, steps: int) -> st.Policy:
    return st.Movement(sparsity=sparsity, total_steps=steps, allocation="global", mode="threshold")


METHODS: dict[str, Method] = {
    "dense": Method("Dense", None),
    "static": Method("Static, ERK", _static),
    "rigl": Method("RigL", _rigl),
    "gradual": Method("Gradual", _gradual),
    "soft_threshold": Method("Soft threshold (STR)", _str),
    "hard_concrete": Method("Hard concrete (L0)", _hard_concrete),
    "gumbel_softmax": Method("Gumbel-softmax", _gumbel_softmax),
    "variational_dropout": Method(
        "Variational dropout", _variational_dropout, optimizer=adam, longer=2
    ),
    "variational_dropout_long": Method(
        "Variational dropout, 120 epochs", _variational_dropout, optimizer=adam, longer=6
    ),
    "movement": Method("Movement, top-k", _movement),
    "soft_movement": Method("Movement, threshold", _soft_movement),
}
LEARNED = tuple(METHODS)[4:]
