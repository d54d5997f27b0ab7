"""The sparse part of a checkpoint in the form that `torch.distributed.checkpoint` carries.

`get_state_dict` keeps the states of parameters and the parameter groups, and loading fills what a
fresh optimizer would save, name by name. So this form stands in the first parameter group, its
names are the same before and after training, and its tensors have as many rows as their weight, by
which they are shared out over any number of ranks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

#: Of a saved target, what is no number.
_TENSORS = ("mask", "latent")


def pack(saved: Mapping[str, Any], remembered: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    """The form that travels, of a state dict's sparse part; tensors are shared.

    Which weights were ever explored does not travel: that begins anew.

    Args:
        remembered: for each group what its policy may keep of each weight, as it begins.
    """
    tensors: dict[str, Tensor] = {}
    targets: dict[str, Any] = {}
    for name, entry in saved["targets"].items():
        tensors |= {f"target.{name}.{key}": entry[key] for key in _TENSORS if key in entry}
        targets[name] = {key: value for key, value in entry.items() if key not in _TENSORS}
    numbers: list[dict[str, Any]] = []
    kept: list[list[str]] = []
    for index, (memory, begins) in enumerate(zip(saved["memories"], remembered, strict=True)):
        found = {key: value for key, value in memory.items() if isinstance(value, Tensor)}
        tensors |= {f"memory.{index}.{k}": v for k, v in (dict(begins) | found).items()}
        numbers.append({k: v for k, v in memory.items() if k not in found})
        kept.append(list(found))
    plain = {
        "version": saved["version"],
        "recipe": saved["recipe"],
        "step_count": saved["step_count"],
        "targets": targets,
        "memories": numbers,
        "kept": kept,
        "tracker": saved["tracker"] | {"explored": None},
        "measured": saved["measured"],
    }
    return {"plain": json.dumps(plain), "generator": saved["generator"], "tensors": tensors}


def unpack(packed: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `pack`, but for the explored weights.

    Raises:
        ValueError: a part of it is missing.
    """
    try:
        saved: dict[str, Any] = json.loads(packed["plain"])
        tensors = packed["tensors"]
        for name, entry in saved["targets"].items():
            places = {key: f"target.{name}.{key}" for key in _TENSORS}
            entry |= {key: tensors[place] for key, place in places.items() if place in tensors}
        for index, (memory, kept) in enumerate(
            zip(saved["memories"], saved.pop("kept"), strict=True)
        ):
            memory |= {key: tensors[f"memory.{index}.{key}"] for key in kept}
        return saved | {"generator": packed["generator"]}
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"the checkpoint is damaged: its masks are not whole ({error})") from error
