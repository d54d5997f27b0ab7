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
VERSION = 1


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


def check(saved: Any, recipe: Recipe, targets: Mapping[str, MaskedTarget]) -> None:
    """Refuse a checkpoint that does not belong here, before anything is changed.

    Raises:
        ValueError: it has no masks, or another version, recipe, layer set or shape.
    """
    if not isinstance(saved, dict):
        raise ValueError(
            "this checkpoint has no masks (it is of a plain optimizer); load it into "
            "`optimizer.base` if dense optimizer state is what you want"
        )
    if saved.get("version") != VERSION:
        raise ValueError(f"checkpoint version {saved.get('version')} is not {VERSION}")
    _check_recipe(json.loads(saved["recipe"]), recipe.to_dict())
    _check_targets(saved["targets"], targets)


def _check_recipe(saved: Any, mine: Any, path: str = "recipe") -> None:
    if isinstance(saved, dict) and isinstance(mine, dict):
        for key in sorted(set(saved) | set(mine)):
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
        if tuple(entry["shape"]) != targets[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(entry['shape'])} in the checkpoint and "
                f"{targets[name].shape} here"
            )
