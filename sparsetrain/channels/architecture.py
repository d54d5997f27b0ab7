"""The sizes of a pruned network in a small file, from which it is built again."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from torch import nn
from torch.nn import Parameter

from sparsetrain.channels.heads import head_counts
from sparsetrain.channels.sides import counts
from sparsetrain.config import Config, did_you_mean
from sparsetrain.narrowing import replace_data


class Architecture(Config):
    """What differs between a class's network and the pruned one: sizes, without the weights.

    Save it beside the `state_dict` of the pruned network. Later, make a network of the class,
    `shape` it, and load the `state_dict`.
    """

    format: Literal["sparsetrain-architecture-1"] = "sparsetrain-architecture-1"
    tensors: dict[str, tuple[int, ...]] = Field(description="name -> shape, of every tensor")
    attributes: dict[str, dict[str, Any]] = Field(
        description="module -> attributes that count channels or heads"
    )

    @classmethod
    def of(cls, model: nn.Module) -> Architecture:
        """The sizes that a model has now."""
        return cls(
            tensors={name: tuple(tensor.shape) for name, tensor in _tensors(model).items()},
            attributes={
                name: found
                for name, module in model.named_modules()
                if (found := counts(module) or head_counts(module))
            },
        )

    def save(self, path: str | Path) -> None:
        """Write a JSON file."""
        Path(path).write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Architecture:
        """Read a JSON file.

        Raises:
            ValueError: it is not what `save` writes.
        """
        try:
            return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))
        except ValidationError as error:
            raise ValueError(f"{path} is no architecture file: {error}") from error

    @torch.no_grad()
    def shape(self, model: nn.Module) -> nn.Module:
        """Give a network of the same class these sizes, in place. Its weights mean nothing then.

        Returns:
            The model.

        Raises:
            ValueError: the model has other tensors or layers; it stays as it was.
        """
        present = _tensors(model)
        for name in self.tensors.keys() ^ present.keys():
            where = "model" if name in self.tensors else "architecture file"
            near = did_you_mean(name, present.keys() | self.tensors.keys() - {name})
            raise ValueError(f"the {where} has no tensor {name!r}{near}: is the class the same?")
        modules = dict(model.named_modules())
        for name in self.attributes.keys() - modules.keys():
            raise ValueError(f"the model has no module {name!r}: is the class the same?")
        for name, size in self.tensors.items():
            tensor = present[name]
            if tuple(tensor.shape) == size:
                continue
            path, _, leaf = name.rpartition(".")
            if isinstance(tensor, Parameter):
                replace_data(tensor, tensor.data.new_zeros(size))
            else:
                setattr(modules[path], leaf, tensor.new_zeros(size))
        for name, attributes in self.attributes.items():
            for attribute, value in attributes.items():
                setattr(modules[name], attribute, tuple(value) if type(value) is list else value)
        return model


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
