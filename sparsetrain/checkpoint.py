"""The sparse part of a checkpoint: plain tensors, numbers and strings, checked before use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsetrain.config import did_you_mean
from sparsetrain.recipe import Recipe
from sparsetrain.storage.masked import MaskedTarget

KEY = "sparsetrain"
VERSION = 2


def pack_mask(mask: Tensor) -> Tensor:
    """Eight bools a byte: uint8 tensor [ceil(numel / 8)] on the CPU."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1)))


def unpack_mask(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Inverse of `pack_mask`."""
    count = int(np.prod(shape, dtype=np.int64))
    bits = np.unpackbits(packed.cpu().numpy(), count=count)
    return torch.from_numpy(bits.astype(bool)).reshape(shape)


def describe_target(target: MaskedTarget) -> dict[str, Any]:
    """What is saved of one target."""
    return {
        "shape": list(target.shape),
        "mask": pack_mask(target.mask),
        **target.extra_state(),
    }


def check(saved: Any, recipe: Recipe, targets: Mapping[str, MaskedTarget], groups: int) -> None:
    """Refuse a checkpoint that does not belong here or is damaged, before anything is changed.

    Args:
        groups: number of target groups, each of which has a memory.

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
    _check_targets(saved["targets"], targets)
    if len(saved["memories"]) != groups:
        raise ValueError(f"the checkpoint has {len(saved['memories'])} target groups, not {groups}")


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


def _check_targets(saved: Mapping[str, Any], targets: Mapping[str, MaskedTarget]) -> None:
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
        _check_target(name, entry, targets[name])


def _check_target(name: str, entry: Mapping[str, Any], target: MaskedTarget) -> None:
    shape = tuple(entry.get("shape", ()))
    if shape != target.shape:
        raise ValueError(f"{name} has shape {shape} in the checkpoint and {target.shape} here")
    mask = entry.get("mask")
    bytes_wanted = -(-target.numel // 8)
    if not isinstance(mask, Tensor) or mask.dtype != torch.uint8 or mask.numel() != bytes_wanted:
        raise ValueError(f"the checkpoint is damaged: the mask of {name} is not {bytes_wanted} B")
    for key, mine in target.extra_state().items():
        value = entry.get(key)
        if not isinstance(value, Tensor) or value.shape != mine.shape:
            raise ValueError(f"the checkpoint is damaged: the {key} weight of {name} is not whole")
