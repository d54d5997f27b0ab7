"""The sparse part of a checkpoint: plain tensors, numbers and strings, checked before use."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparsetrain import travelling
from sparsetrain.config import did_you_mean
from sparsetrain.recipe import Recipe
from sparsetrain.storage.bits import unpack_rows
from sparsetrain.storage.csr.pattern import Pattern, as_matrix
from sparsetrain.storage.csr.target import check_pattern_entry
from sparsetrain.storage.masked import check_mask_entry
from sparsetrain.targets import SparseTarget

KEY = "sparsetrain"
VERSION = 3


def joined(
    state: dict[str, Any], saved: dict[str, Any], remembered: Sequence[Mapping[str, Tensor]]
) -> dict[str, Any]:
    """A base optimizer's state dict with the sparse part in it.

    Args:
        remembered: as `travelling.pack` takes it.
    """
    state = {**state, KEY: saved}
    first, *others = state["param_groups"]
    if all(storage_of(entry) != "csr" for entry in saved["targets"].values()):
        first = {**first, KEY: travelling.pack(saved, remembered)}
    return {**state, "param_groups": [first, *others]}


def split(state: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Inverse of `joined`: the base optimizer's state dict, and the sparse part or None."""
    groups = [dict(group) for group in state.get("param_groups", [])]
    packed = [group.pop(KEY) for group in groups if KEY in group]
    saved = state.get(KEY)
    if saved is None and packed:
        saved = travelling.unpack(packed[0])
    rest = {key: value for key, value in state.items() if key != KEY}
    return rest | ({"param_groups": groups} if "param_groups" in state else {}), saved


def describe_target(target: SparseTarget) -> dict[str, Any]:
    """What is saved of one target."""
    return {"shape": list(target.shape), "storage": target.storage, **target.describe()}


def storage_of(entry: Mapping[str, Any]) -> str:
    """How the weight of a saved target was held."""
    storage = entry.get("storage", "masked")  # checkpoints before csr storage do not say
    return str(storage)


def mask_of(entry: Mapping[str, Any], target: SparseTarget) -> Tensor:
    """The mask that a saved target describes, bool of the weight's shape."""
    if storage_of(entry) != "csr":
        return unpack_rows(entry["mask"], target.shape)
    pattern = Pattern(as_matrix(target.shape), entry["row_pointers"], entry["columns"])
    return pattern.mask().view(target.shape)


def check(
    saved: Any,
    recipe: Recipe,
    targets: Mapping[str, SparseTarget],
    groups: int,
    can_switch: Callable[[str], bool] = lambda name: False,
) -> None:
    """Refuse a checkpoint that does not belong here or is damaged, before anything is changed.

    Args:
        groups: number of target groups, each of which has a memory.
        can_switch: whether the weight of this name may be held as the checkpoint has it.

    Raises:
        ValueError: it has no masks, lacks a part, or is of another version, recipe, layer set or
            shape.
    """
    if not isinstance(saved, dict):
        raise ValueError(
            "this checkpoint has no masks (it is of a plain optimizer); load it into "
            "`optimizer.base` if dense optimizer state is what you want"
        )
    if saved.get("version") != VERSION:
        raise ValueError(f"checkpoint version {saved.get('version')} is not {VERSION}")
    for part, kind in _PARTS.items():
        if not isinstance(saved.get(part), kind):
            raise ValueError(f"the checkpoint is damaged: its {part!r} is missing or no {kind}")
    if saved["step_count"] < 0:
        raise ValueError(f"the checkpoint is damaged: step_count is {saved['step_count']}")
    try:
        torch.Generator().set_state(saved["generator"].cpu())
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"the checkpoint is damaged: its 'generator': {error}") from error
    if not saved["tracker"].keys() >= {"idle", "idle_with_gradient", "explored"}:
        raise ValueError("the checkpoint is damaged: its 'tracker' is not whole")
    _check_recipe(json.loads(saved["recipe"]), recipe.to_dict())
    _check_targets(saved["targets"], targets, can_switch)
    if len(saved["memories"]) != groups:
        raise ValueError(f"the checkpoint has {len(saved['memories'])} target groups, not {groups}")


def check_groups(state: Mapping[str, Any], base: Optimizer) -> None:
    """Refuse a base optimizer's state that torch would refuse, before anything is changed.

    Raises:
        ValueError: it has other parameter groups.
    """
    there = [len(group["params"]) for group in state.get("param_groups", [])]
    here = [len(group["params"]) for group in base.param_groups]
    if there != here:
        raise ValueError(
            f"the checkpoint's parameter groups hold {there} tensors, the optimizer's {here}: "
            "build the optimizer as it was built then"
        )


_CHECKS: dict[str, Callable[[str, tuple[int, ...], Mapping[str, Any]], None]] = {
    "masked": check_mask_entry,
    "learned": check_mask_entry,
    "csr": check_pattern_entry,
}
_PARTS: dict[str, type] = {
    "recipe": str,
    "step_count": int,
    "generator": Tensor,
    "targets": dict,
    "memories": list,
    "tracker": dict,
}


def _check_recipe(saved: Any, mine: Any, path: str = "recipe") -> None:
    if isinstance(saved, dict) and isinstance(mine, dict):
        # The kind first: fields of different methods say little beside each other.
        for key in sorted(set(saved) | set(mine), key=lambda key: (key != "kind", key)):
            _check_recipe(saved.get(key), mine.get(key), f"{path}.{key}")
    elif saved != mine:
        raise ValueError(
            f"the checkpoint is of another policy: {path} is {saved!r} there and {mine!r} here"
        )


def _check_targets(
    saved: Mapping[str, Any],
    targets: Mapping[str, SparseTarget],
    can_switch: Callable[[str], bool],
) -> None:
    for name in targets:
        if name not in saved:
            raise ValueError(
                f"the checkpoint has no mask for {name}{did_you_mean(name, saved)}: it is of "
                "another model or rule set"
            )
    for name, entry in saved.items():
        if name not in targets:
            raise ValueError(
                f"the checkpoint has a mask for {name}, which is no target here"
                f"{did_you_mean(name, targets)}"
            )
        _check_target(name, entry, targets[name], can_switch)


def _check_target(
    name: str,
    entry: Mapping[str, Any],
    target: SparseTarget,
    can_switch: Callable[[str], bool],
) -> None:
    shape = tuple(entry.get("shape", ()))
    if shape != target.shape:
        raise ValueError(f"{name} has shape {shape} in the checkpoint and {target.shape} here")
    storage = storage_of(entry)
    if storage not in _CHECKS or (storage != target.storage and not can_switch(name)):
        raise ValueError(
            f"{name} is held as {storage_of(entry)} in the checkpoint and as {target.storage} "
            "here: give the optimizer the same storage= as then"
        )
    try:
        _CHECKS[storage](name, target.shape, entry)
        if storage == target.storage:
            target.check_entry(entry)
    except ValueError as error:
        raise ValueError(f"the checkpoint is damaged: {error}") from error
