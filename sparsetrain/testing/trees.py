"""State dicts as values: frozen copies, and where two of them differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from sparsetrain.testing.case import fingerprint


def frozen(tree: Any) -> Any:
    """A copy in which tensors do not change any more."""
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree)


def first_difference(expected: Any, found: Any, path: str = "") -> str | None:
    """Where two trees of dicts, lists, tensors and plain values differ, or None."""
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        if expected.keys() != found.keys():
            return f"{path or 'its'} keys"
        pairs = [(key, expected[key], found[key]) for key in expected]
    elif isinstance(expected, list | tuple) and isinstance(found, list | tuple):
        if len(expected) != len(found):
            return f"{path or 'its'} length"
        pairs = [(n, *both) for n, both in enumerate(zip(expected, found, strict=True))]
    else:
        return None if _alike(expected, found) else path or "it"
    for key, one, other in pairs:
        different = first_difference(one, other, f"{path}.{key}" if path else str(key))
        if different is not None:
            return different
    return None


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same_kind = one.shape == other.shape and one.dtype == other.dtype
        return same_kind and fingerprint(one) == fingerprint(other)
    return type(one) is type(other) and bool(one == other or one is other)
