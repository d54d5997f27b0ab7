"""Static: a mask chosen once and held."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from sparsetrain.allocation import ErdosRenyiKernel
from sparsetrain.config import Config
from sparsetrain.policies.base import Policy, scored_masks
from sparsetrain.policies.group import TargetGroup
from sparsetrain.scores import Random, ScoreField
from sparsetrain.storage.bits import pack_mask, unpack_mask
from sparsetrain.structures import Unstructured


class PackedMask(Config):
    """A mask as plain data, so that it can stand in a recipe."""

    shape: tuple[int, ...] = Field(description="of the weight")
    bits: str = Field(description="True where active, row by row, eight a byte, as base64")

    @model_validator(mode="after")
    def _has_all_bits(self) -> PackedMask:
        numel = int(torch.Size(self.shape).numel())
        if len(base64.b64decode(self.bits, validate=True)) != -(-numel // 8):
            raise ValueError(f"the bits are not those of a mask of shape {self.shape}")
        return self

    @classmethod
    def of(cls, value: Any) -> Any:
        """Pack a tensor; leave everything else."""
        if not isinstance(value, Tensor):
            return value
        if value.dtype != torch.bool:
            raise ValueError(f"a mask is a bool tensor, not one of {value.dtype}")
        packed = pack_mask(value).numpy().tobytes()
        return cls(shape=tuple(value.shape), bits=base64.b64encode(packed).decode())

    def tensor(self) -> Tensor:
        """The bool tensor."""
        packed = bytearray(base64.b64decode(self.bits))
        return unpack_mask(torch.frombuffer(packed, dtype=torch.uint8), self.shape)


class Static(Policy):
    """Choose a mask at the start, random or by a score, and train with it (the field's baseline).

    With `Magnitude()` on a trained network this is one-shot pruning and fine-tuning
    (Han et al. 2015); with random masks it is the control that every method has to beat. With
    `masks` nothing is chosen: they are held, as `st.prune` or another run has left them.
    """

    kind: Literal["static"] = "static"

    score: ScoreField = Field(default_factory=Random, description="what the mask is chosen by")
    masks: dict[str, Annotated[PackedMask, BeforeValidator(PackedMask.of)]] | None = Field(
        None, description="name of a weight -> bool tensor; instead of a sparsity and a score"
    )

    @model_validator(mode="after")
    def _masks_stand_alone(self) -> Static:
        if self.masks is None:
            return self
        for field, default in (
            ("sparsity", None),
            ("allocation", ErdosRenyiKernel()),
            ("structure", Unstructured()),
            ("score", Random()),
        ):
            if getattr(self, field) != default:
                raise ValueError(f"'masks' say what is active: leave {field!r} out")
        return self

    def _needs_sparsity(self) -> bool:
        return self.masks is None and super()._needs_sparsity()

    def counts(self, group: TargetGroup) -> dict[str, int]:
        """Active weights of each target's mask."""
        if self.masks is None:
            return super().counts(group)
        return {t.name: int(self._mask_of(t.name, t.shape).count_nonzero()) for t in group.targets}

    def initial_masks(self, group: TargetGroup) -> dict[str, Tensor]:
        """The masks, or the weights with the highest scores."""
        if self.masks is None:
            return scored_masks(self, group, self.score)
        return {
            t.name: t.part.held(self._mask_of(t.name, t.shape)).to(t.param.device)
            for t in group.to_choose
        }

    def narrowed(self, name: str, dim: int, keep: Tensor) -> Static:
        """The same with what is left of the mask, where it is given."""
        if self.masks is None or name not in self.masks:
            return self
        left = self.masks[name].tensor().index_select(dim, keep.cpu())
        return self.model_copy(update={"masks": self.masks | {name: PackedMask.of(left)}})

    def _mask_of(self, name: str, shape: tuple[int, ...]) -> Tensor:
        assert self.masks is not None
        if name not in self.masks:
            raise ValueError(
                f"Static has no mask for {name}: give one, or keep it dense with a rule"
            )
        mask = self.masks[name].tensor()
        if tuple(mask.shape) != shape:
            raise ValueError(f"the mask of {name} has shape {tuple(mask.shape)}, not {shape}")
        return mask
