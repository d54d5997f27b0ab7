"""The methods that are compared, as recipes: a table from name to policy.

All sparse-to-sparse methods share one allocation (ERK), one update interval and one stop, so that
they differ in the rule alone. `static_uniform` is there to show what the allocation is worth.
"""

from __future__ import annotations

from collections.abc import Callable

import sparsetrain as st

EVERY = 100  # steps between mask updates
STOP = 0.75  # of the training run
WARM_UP = 0.1  # of the training run: dense before gradual pruning and surgery begin
#: Every method replaces 30 % of the connections at first and none at the end (Evci et al. 2020).
DROP = st.Schedule(shape="cosine", initial=0.3, final=0.0)

LABELS = {
    "dense": "Dense",
    "static_uniform": "Static, uniform",
    "static_erk": "Static, ERK",
    "set": "SET",
    "rigl": "RigL",
    "snfs": "SNFS",
    "gradual": "Gradual",
    "surgery": "Surgery (DNS)",
}


def _static_uniform(sparsity: float, total_steps: int) -> st.Policy:
    return st.Static(sparsity=sparsity, allocation=st.Uniform())


def _static_erk(sparsity: float, total_steps: int) -> st.Policy:
    return st.Static(sparsity=sparsity)


def _set(sparsity: float, total_steps: int) -> st.Policy:
    return st.SET(
        sparsity=sparsity, total_steps=total_steps, drop_fraction=DROP, update=_updates(0)
    )


def _rigl(sparsity: float, total_steps: int) -> st.Policy:
    return st.RigL(
        sparsity=sparsity, total_steps=total_steps, drop_fraction=DROP, update=_updates(0)
    )


def _snfs(sparsity: float, total_steps: int) -> st.Policy:
    return st.SNFS(
        sparsity=sparsity, total_steps=total_steps, drop_fraction=DROP, update=_updates(0)
    )


def _gradual(sparsity: float, total_steps: int) -> st.Policy:
    start = round(WARM_UP * total_steps)
    return st.Gradual(sparsity=sparsity, total_steps=total_steps, update=_updates(start))


def _surgery(sparsity: float, total_steps: int) -> st.Policy:
    # Pruned weights train on unseen by the loss, so their return cannot wait: with 10 steps between
    # updates and this learning rate they run away and training diverges. The paper's interval is 1.
    update = st.UpdateSchedule(every=1, start=round(WARM_UP * total_steps), stop=STOP)
    return st.DynamicNetworkSurgery(sparsity=sparsity, total_steps=total_steps, update=update)


def _updates(start: int) -> st.UpdateSchedule:
    return st.UpdateSchedule(every=EVERY, start=start, stop=STOP)


#: (sparsity, total steps) -> policy.
SPARSE: dict[str, Callable[[float, int], st.Policy]] = {
    "static_uniform": _static_uniform,
    "static_erk": _static_erk,
    "set": _set,
    "rigl": _rigl,
    "snfs": _snfs,
    "gradual": _gradual,
    "surgery": _surgery,
}


def policy(method: str, sparsity: float, total_steps: int) -> st.Policy | None:
    """The policy of a method; None for dense training."""
    return None if method == "dense" else SPARSE[method](sparsity, total_steps)
