"""Who uses a parameter, by the graph that autograd has built."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


def uses_of_parameters(outputs: Any) -> Counter[int]:
    """id of each parameter that `outputs` depend on -> how many operations use it directly."""
    found: Counter[int] = Counter()
    leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
    waiting = [leaf.grad_fn for leaf in leaves if leaf.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        for function, _ in waiting.pop().next_functions:
            if function is None:
                continue
            if hasattr(function, "variable"):
                found[id(function.variable)] += 1
            elif function not in seen:
                seen.add(function)
                waiting.append(function)
    return found
