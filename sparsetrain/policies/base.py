"""The contract of a policy: how masks begin, when they change, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator
from torch import Tensor

from sparsetrain.allocation import (
    AllocationField,
    ErdosRenyiKernel,
    Global,
    LayerShape,
    allocate,
)
from sparsetrain.candidates import Candidate
from sparsetrain.config import AnyKind, Kinded
from sparsetrain.policies.engine import obeys
from sparsetrain.policies.group import TargetGroup
from sparsetrain.schedules import UpdateSchedule
from sparsetrain.scores import Score
from sparsetrain.selection import select, top_k_across
from sparsetrain.structures import NM, StructureField, Unstructured
from sparsetrain.targets import SparseTarget


class Policy(Kinded):
    """Base of all mask policies. A policy is data; what changes lives in its `TargetGroup`.

    A subclass sets `kind`, says in class variables what it needs, and overrides the methods it
    differs in. `policies/set.py` is the shortest complete example.
    """

    family: ClassVar[str] = "policy"
    #: What it makes sparse, in words.
    of: ClassVar[str] = "Linear or Conv weight"
    #: True when an update takes the place of the gradient step (RigL).
    replaces_step: ClassVar[bool] = False
    #: True when inactive weights keep a dense, latent value that trains on (surgery, SR-STE).
    latent: ClassVar[bool] = False
    #: At which steps the gradient of inactive weights is needed; also what FLOPs are counted for.
    dense_gradient: ClassVar[Literal["never", "updates", "always"]] = "never"

    sparsity: float | None = Field(
        None, ge=0, lt=1, description="share of zeros over all targets of the policy, in [0, 1)"
    )
    allocation: AllocationField = Field(
        default_factory=ErdosRenyiKernel, description="how density is shared among layers"
    )
    structure: StructureField = Field(
        default_factory=Unstructured, description="which weights are kept or dropped together"
    )

    @model_validator(mode="after")
    def _one_way_to_say_how_sparse(self) -> Policy:
        if self.allocation.fixes_density and self.sparsity is not None:
            raise ValueError(
                f"give either 'sparsity' or allocation {self.allocation.kind!r}, which fixes the "
                "densities itself"
            )
        if self._needs_sparsity() and self.sparsity is None:
            raise ValueError("'sparsity' is missing: the share of zeros, in [0, 1)")
        self._structure_fits()
        if isinstance(self.structure, NM):
            self.structure.check_sparsity(self.sparsity)
        return self

    def _structure_fits(self) -> None:
        if isinstance(self.allocation, Global) and not isinstance(self.structure, Unstructured):
            raise ValueError("allocation 'global' ranks single weights: leave 'structure' out")

    def _needs_sparsity(self) -> bool:
        return not (self.allocation.fixes_density or isinstance(self.structure, NM))

    def takes(self, candidate: Candidate) -> bool:
        """Whether the policy is for such a tensor, when nobody names others."""
        return candidate.is_weight

    def accepts(self, candidate: Candidate) -> bool:
        """Whether the policy can hold such a tensor, when a rule names it."""
        return candidate.can_be_sparse

    def with_sparsity(self, sparsity: float) -> Policy:
        """The same policy asked for another sparsity."""
        return type(self).model_validate({**self.model_dump(), "sparsity": sparsity})

    def layer_shapes(self, group: TargetGroup) -> list[LayerShape]:
        """Names, shapes and count granularity of the targets, for allocation."""
        shapes = []
        for target in group.targets:
            self.structure.check(target.shape, target.name)
            quantum = self.structure.quantum(target.shape)
            built = target.active if target.built else None
            shapes.append(LayerShape(target.name, target.shape, quantum, built))
        return shapes

    def counts(self, group: TargetGroup) -> dict[str, int]:
        """Active weights that each target should have."""
        shapes = self.layer_shapes(group)
        if isinstance(self.structure, NM):
            return {layer.name: self.structure.fixed_count(layer.shape) for layer in shapes}
        return allocate(self.allocation, shapes, self.sparsity)

    def target_densities(self, group: TargetGroup) -> dict[str, float]:
        """Density each target should end at; nothing for a target that scores decide on."""
        if isinstance(self.allocation, Global):
            return {}
        counts = self.counts(group)
        return {t.name: counts[t.name] / t.numel for t in group.targets}

    def initial_masks(self, group: TargetGroup) -> dict[str, Tensor]:
        """Masks of `group.to_choose` to begin with, of what is held here (`target.part`).

        Must not change model, targets or optimizer.
        """
        return random_masks(self, group)

    def update_is_due(self, step: int) -> bool:
        """Whether masks change at this step (0-based)."""
        return False

    def needs_dense_gradient(self, step: int) -> bool:
        """Whether this step takes the gradient of inactive weights (counted in FLOPs)."""
        if self.dense_gradient == "updates":
            return self.update_is_due(step)
        return self.dense_gradient == "always"

    def follow_clock(self, group: TargetGroup, step: int) -> None:
        """Set what follows from the clock alone, before the step of this number."""

    def observe(self, group: TargetGroup, step: int) -> None:
        """See the dense gradients of a step, before inactive ones are dropped."""

    def update_masks(self, group: TargetGroup, step: int) -> None:
        """Change the masks of the group, through `group.exchange` or `group.replace_mask`."""

    def penalty(self, group: TargetGroup, step: int) -> Tensor | None:
        """What the policy adds to the loss at this step; None for one without a regulariser."""
        return None

    def remembers(self, group: TargetGroup) -> dict[str, Tensor]:
        """Every tensor that may be in the group's memory at some time, as it begins.

        So that a checkpoint has the same entries at every step. Numbers need not be told of.
        """
        return {}

    def finish(self, group: TargetGroup, step: int) -> None:
        """Do what is left to do before the masks become final."""

    # When weights lose slices.

    def narrowed(self, name: str, dim: int, keep: Tensor) -> Policy:
        """The same policy for a weight of which nothing but `keep` is left along `dim`."""
        return self

    def after_narrowing(self, group: TargetGroup, narrowed: Sequence[SparseTarget]) -> None:
        """Look at targets that have lost slices; their masks keep what is left of them.

        This is rehearsed on copies of the targets, so an error comes before any change.

        Raises:
            ValueError: naming the layer, when the policy cannot work with what is left.
        """
        self.counts(group)
        for target in narrowed:
            if not obeys(self.structure, target.mask):
                raise ValueError(
                    f"what would be left of {target.name}, {tuple(target.shape)}, does not have "
                    f"the structure {self.structure!r}"
                )


class DynamicPolicy(Policy):
    """A policy whose masks change over a known number of training steps."""

    #: End of the updates when the schedule gives none: a fraction of `total_steps`.
    default_stop: ClassVar[float] = 0.75
    #: Whether the policy would never become sparse without an update.
    starts_dense: ClassVar[bool] = False

    total_steps: int = Field(ge=1, description="optimizer steps in the whole training run")
    update: UpdateSchedule = Field(
        default_factory=UpdateSchedule, description="when masks change (steps)"
    )

    @model_validator(mode="after")
    def _update_fits(self) -> DynamicPolicy:
        if self.stop_step() <= self.update.start and self.starts_dense:
            raise ValueError("'update' names no step, so nothing would ever be pruned")
        return self

    def stop_step(self) -> int:
        """First step at which masks change no more."""
        stop = self.update.stop_step(self.total_steps, self.default_stop)
        assert stop is not None  # total_steps is always known here
        return stop

    def update_is_due(self, step: int) -> bool:
        """Whether the update schedule names this step."""
        return self.update.is_due(step, self.total_steps, self.default_stop)

    def progress(self, step: int) -> float:
        """Position of `step` between the schedule's start and stop, in [0, 1]."""
        start, stop = self.update.start, self.stop_step()
        return min(max((step - start) / max(stop - start, 1), 0.0), 1.0)


def random_masks(policy: Policy, group: TargetGroup) -> dict[str, Tensor]:
    """Random masks with exactly the allocated counts."""
    counts = policy.counts(group)
    masks = {}
    for target in group.to_choose:
        # Every rank draws for the whole weight, so nothing has to be sent.
        scores = torch.rand(target.shape, generator=group.generator)
        mask = select(scores, counts[target.name], policy.structure, name=target.name)
        masks[target.name] = target.part.held(mask)
    return masks


def scored_masks(policy: Policy, group: TargetGroup, score: Score) -> dict[str, Tensor]:
    """Masks of the weights with the highest scores, exactly the allocated counts."""
    counts = policy.counts(group)
    scores = {
        t.name: t.part.held(score.of(t.name, t.param, group.state_of(t.param), group.generator))
        for t in group.to_choose
    }
    return best_masks(policy, group, scores, counts)


def best_masks(
    policy: Policy, group: TargetGroup, scores: Mapping[str, Tensor], counts: Mapping[str, int]
) -> dict[str, Tensor]:
    """Masks of the weights with the highest scores, of each target's or of all together.

    Args:
        scores: name -> scores of what is held here.
        counts: name -> active weights of the whole weight.
    """
    parts = {target.name: target.part for target in group.to_choose}
    if isinstance(policy.allocation, Global) and isinstance(policy.structure, Unstructured):
        return top_k_across(scores, sum(counts[name] for name in scores), parts=parts)
    return {
        name: select(values, counts[name], policy.structure, name=name, part=parts[name])
        for name, values in scores.items()
    }


def _build(value: Any) -> Any:
    return Policy.build(value)


PolicyField = Annotated[
    SerializeAsAny[Policy],
    BeforeValidator(_build, json_schema_input_type=Annotated[Policy, AnyKind(Policy)]),
]
