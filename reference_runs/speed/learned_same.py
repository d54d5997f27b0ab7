"""Whether our learned masks and the naive ones compute the same; otherwise times say nothing."""

from __future__ import annotations

import torch
from torch import Tensor

import sparsetrain as st
from reference_runs.speed.contenders import batches
from reference_runs.speed.learned_loops import BATCH, CASES, SPARSITY, Loop, Naive, Ours, data


def check_same(method: str, network: str, optimizer: str, ours: Ours, naive: Naive) -> None:
    """Compare outputs, penalty and gradients at equal parameters and equal noise.

    Raises RuntimeError when they differ. The state stays what it was, as no weight moves any more.
    """
    case = CASES[method]
    if case.checked is not None:
        ours = Ours(network, optimizer, case.checked)
        ours.settle(0)
        naive = Naive(network, optimizer, case, ours)
    x = data().test_x[:200]
    for loop in (ours, naive):
        loop.model.eval()
    with torch.no_grad():
        _require(_agree(ours.model(x), naive.model(x)), method, "outputs of evaluation")
        penalty = naive.penalty()
        if penalty is not None:
            mine = torch.stack([t.learned.penalty(t.param) for t in ours.targets.values()]).sum()
            _require(_agree(mine, penalty), method, "penalties")
    for loop in (ours, naive):
        loop.model.train()
        loop.stream = batches(data(), BATCH)
        torch.manual_seed(0)
        loop.train_step()
    gates = {id(t.learned.gates()[0]) for t in ours.targets.values()}
    for parameter, twin in naive.pairs.items():
        if case.gates_differ and id(parameter) in gates:
            continue
        assert parameter.grad is not None and twin.grad is not None
        what = f"gradients of shape {tuple(twin.shape)}"
        _require(_agree(parameter.grad, twin.grad), method, what)


def check_steps() -> None:
    """Train some steps without steering, or with the same; losses have to agree.

    Raises RuntimeError when they do not.
    """
    at_once = st.UpdateSchedule(every=10, start=5, stop=6)
    top_k = st.Movement(sparsity=SPARSITY, total_steps=100, allocation="global", update=at_once)
    decay = st.SoftThreshold(strength=1e-2, initial=-4.0)
    policies = {
        "soft_threshold": ("SGD", decay),
        "movement": ("Adam", top_k),
    }
    for method, (optimizer, policy) in policies.items():
        ours = Ours("lenet_300_100", optimizer, policy)
        naive = Naive("lenet_300_100", optimizer, CASES[method], ours)
        losses = [_losses(loop, 16) for loop in (ours, naive)]
        _require(_agree(*losses), method, "losses of 16 steps")


def _losses(loop: Loop, steps: int) -> Tensor:
    losses = []
    for _ in range(steps):
        loop.train_step()
        losses.append(loop.last_loss)
    return torch.stack(losses)


def _agree(mine: Tensor, theirs: Tensor) -> bool:
    """Whether zeros are where they should be and half of the others are equal within 2 %.

    Not all: a border moved by one rounding is a weight that one of them drops.
    """
    least = 1e-7 * mine.abs().max()
    used = mine.abs() > least
    if float(((theirs.abs() > least) != used).float().mean()) > 0.01:
        return False
    apart = (mine - theirs)[used].abs().median()
    return bool(apart <= 0.02 * mine[used].abs().median())


def _require(agree: bool, method: str, what: str) -> None:
    if not agree:
        raise RuntimeError(f"{method}: the {what} of the naive version differ; nothing was timed")
