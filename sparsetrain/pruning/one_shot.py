"""Prune a trained (or untrained) network by a score, in one go or in the score's rounds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.allocation import (
    Allocation,
    Global,
    LayerShape,
    UniformFirstDense,
    allocate,
    parse_allocation,
)
from sparsetrain.batches import Adapter
from sparsetrain.calibration import Calibration
from sparsetrain.candidates import Candidate, choose, unwrapped
from sparsetrain.cost.targets import CostTarget
from sparsetrain.curvature.losses import LossFunction
from sparsetrain.distributed.averaging import Ranks
from sparsetrain.part import part_of
from sparsetrain.pruning.result import PruneResult
from sparsetrain.pruning.sequence import stages, weights_back
from sparsetrain.pruning.within import MaskBound, masks_within
from sparsetrain.scores import Score
from sparsetrain.scores.base import Scope
from sparsetrain.scoring import measured
from sparsetrain.selection import select, top_k_across
from sparsetrain.structures import NM, ConstantFanIn, Structure, Unstructured, parse_structure


def prune(
    model: nn.Module,
    score: Score | str,
    sparsity: float | None = None,
    *,
    target: CostTarget | Mapping[str, Any] | None = None,
    example_inputs: Any = None,
    scope: Scope | None = None,
    structure: Structure | str | Mapping[str, Any] = "unstructured",
    allocation: Allocation | str | Mapping[str, Any] | None = None,
    calibration: Iterable[Any] | None = None,
    loss_fn: LossFunction | None = None,
    blocks: str | Sequence[str] | None = None,
    match: str | Sequence[str] | None = None,
    adapter: Adapter | None = None,
    seed: int = 0,
    progress: bool = False,
) -> PruneResult:
    """Choose which weights of a network to keep. The model itself does not change.

    Weights that are 0 already stay pruned and count. Counts are exact.

    Under `DistributedDataParallel` or `fully_shard` every rank calls this with batches of its own,
    and has its part of the masks that one process would choose that sees the batches of all. The
    n-th batches of the ranks are one batch together.

    Args:
        score: a score of single weights, or its name.
        sparsity: share of zeros over all chosen weights, in [0, 1); None where `target`,
            `allocation` or an n:m structure sets it.
        target: instead of a sparsity, what the network may cost, such as `st.CompressionRate(10)`
            or `st.Flops(0.5)`. The most weights that it leaves are kept.
        example_inputs: for targets that depend on them: a tensor, a tuple of positional or a
            mapping of keyword arguments, for one call of the model.
        scope: what competes: the weights of each "row" (all inputs of an output), of each "layer",
            or of the whole model ("global"). None: as the score's paper has it.
        structure: as for policies, for scope "layer".
        allocation: densities of the layers, for scopes "row" and "layer"; uniform when None.
        calibration: batches for scores that need data: an iterable of (inputs, targets), or of
            what `adapter` makes that of.
        loss_fn: (outputs, targets) -> scalar, for scores that need a loss.
        blocks: glob or globs on modules that are pruned one after the other, each on what the
            pruned ones before it give; "auto" takes the members of the model's largest ModuleList
            or Sequential. None: all at once, on what the model gives as it is.
        match: glob or globs on names of weights or modules; all Linear and Conv weights that
            train when None.
        seed: of whatever is random.
        progress: whether to show a bar.

    Returns:
        The masks; `apply()` sets the zeros, `hold(optimizer)` keeps them through training.

    Raises:
        ValueError: arguments that do not fit each other or the model, data that are missing or do
            not reach a weight, a score or target that sharded weights do not allow.
    """
    ranks = Ranks.of(model)
    model = unwrapped(model)
    chosen: Score = Score.build(score)
    if chosen.per_channel:
        raise ValueError(f"{chosen.title} is of channels: st.prune takes scores of weights")
    candidates = choose(model, match)
    given = Calibration(calibration, loss_fn, adapter, seed, progress, ranks)
    plan = Plan(candidates, scope or chosen.scope, parse_structure(structure), allocation)
    parts = _parts(model, candidates, blocks, chosen, plan)
    run = _Run(model, chosen, candidates, parts, plan, given)
    if target is None:
        return PruneResult(model, plan.wrapped(run.masks(sparsity)), chosen.kind)
    if not plan.is_whole:
        raise ValueError(
            "a target is a cost of whole weights, and these are sharded: give a sparsity, or prune "
            "before fully_shard"
        )
    plan.require_free(sparsity)
    bound = MaskBound.of(target, model, candidates, example_inputs)
    masks = masks_within(bound, run.masks, plan.least, plan.numel)
    return PruneResult(model, masks, chosen.kind)


@dataclass
class _Run:
    """One call of `prune`: masks for any sparsity."""

    model: nn.Module
    score: Score
    candidates: Sequence[Candidate]
    parts: Sequence[Sequence[Candidate]]
    plan: Plan
    given: Calibration

    def __post_init__(self) -> None:
        parts = self.plan.parts
        self.start = {c.name: parts[c.name].held(c.param) != 0 for c in self.candidates}
        self.is_stepwise = self.score.pruning_rounds > 1 or len(self.parts) > 1
        if self.is_stepwise:
            self.given.require_rereadable(self.score.title)

    def masks(self, sparsity: float | None) -> dict[str, Tensor]:
        """Name -> what is here of the mask at this sparsity."""
        rounds = self.score.pruning_rounds
        if rounds > 1 and sparsity is None:
            raise ValueError(f"{self.score.title} prunes in {rounds} rounds: give a sparsity")
        if not self.is_stepwise:
            return self.plan.masks(self.scores, self.start, sparsity)
        masks = self.start
        with weights_back(self.candidates):
            for number in range(1, rounds + 1):
                wanted = sparsity_after(sparsity, number / rounds)
                for part in self.parts:
                    scores = measured(self.model, self.score, part, self.given)
                    masks = masks | self.plan.masks(scores, masks, wanted)
                    zero(part, masks)
        return masks

    @cached_property
    def scores(self) -> dict[str, Tensor]:
        """Of the network as it is."""
        return measured(self.model, self.score, self.candidates, self.given)


def _parts(
    model: nn.Module,
    candidates: Sequence[Candidate],
    blocks: str | Sequence[str] | None,
    score: Score,
    plan: Plan,
) -> Sequence[Sequence[Candidate]]:
    """What is pruned together."""
    if blocks is None:
        return [candidates]
    if score.data == "none" or score.pruning_rounds > 1:
        raise ValueError(f"{score.title} does not look at what blocks get: leave 'blocks' out")
    if isinstance(plan.allocation, Global):
        raise ValueError("scope='global' compares the weights of all blocks: leave 'blocks' out")
    return stages(model, candidates, blocks)


class Plan:
    """Who competes with whom, and for how many places."""

    def __init__(
        self,
        candidates: Sequence[Candidate],
        scope: Scope,
        structure: Structure,
        allocation: Allocation | str | Mapping[str, Any] | None,
    ) -> None:
        if scope not in ("row", "layer", "global"):
            raise ValueError(f"scope={scope!r} is not one of 'row', 'layer', 'global'")
        if scope != "layer" and not isinstance(structure, Unstructured | NM):
            raise ValueError(f"scope={scope!r} compares single weights: leave 'structure' out")
        if scope == "global" and allocation is not None:
            raise ValueError("scope='global' leaves the densities to the scores: no 'allocation'")
        is_free = scope == "row" and isinstance(structure, Unstructured)
        self.structure = ConstantFanIn() if is_free else structure
        ranks_all = scope == "global" and isinstance(structure, Unstructured)
        self.allocation = Global() if ranks_all else parse_allocation(allocation or "uniform")
        self.shapes = []
        self.parts = {c.name: part_of(c.name, c.param) for c in candidates}
        for candidate in candidates:
            shape = tuple(candidate.param.shape)
            self.structure.check(shape, candidate.name)
            quantum = self.structure.quantum(shape)
            self.shapes.append(LayerShape(candidate.name, shape, quantum))

    @property
    def numel(self) -> int:
        """Weights in all."""
        return sum(shape.numel for shape in self.shapes)

    @property
    def least(self) -> int:
        """Weights that are kept at least: one of each layer, or one group."""
        counted = self.shapes
        if isinstance(self.allocation, UniformFirstDense) and len(self.shapes) > 1:
            counted = self.shapes[1:]  # a sparsity is that of the others there
        least, numel = sum(s.quantum for s in counted), sum(s.numel for s in counted)
        return math.ceil(Fraction(least, numel) * self.numel)

    @property
    def is_whole(self) -> bool:
        """Whether no weight is sharded."""
        return all(part.is_whole for part in self.parts.values())

    def wrapped(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is here of masks as masks of the weights."""
        return {name: self.parts[name].wrap(mask) for name, mask in masks.items()}

    def require_free(self, sparsity: float | None) -> None:
        """Raise ValueError if the sparsity is set already, so that a target cannot set it."""
        if sparsity is not None:
            raise ValueError(f"give either sparsity={sparsity} or a target")
        if isinstance(self.structure, NM) or self.allocation.fixes_density:
            raise ValueError("the structure or allocation sets the sparsity: leave 'target' out")

    def masks(
        self, scores: Mapping[str, Tensor], before: Mapping[str, Tensor], sparsity: float | None
    ) -> dict[str, Tensor]:
        """The best of each group; what was pruned before is worse than anything else.

        Args:
            scores: of the weights.
            before: what is here of their masks.

        Returns:
            What is here of the new ones.
        """
        held = {name: self.parts[name].held(values) for name, values in scores.items()}
        lowest = min(self.parts[name].lowest(_lowest(values)) for name, values in held.items())
        below = 2 * lowest - 1
        ranked = {name: values.where(before[name], below) for name, values in held.items()}
        if isinstance(self.allocation, Global):
            total = sum(allocate(self.allocation, self.shapes, sparsity).values())
            chosen = top_k_across(ranked, total, parts=self.parts)
        else:
            counts = self.counts(sparsity)
            chosen = {
                name: select(values, counts[name], self.structure, name=name, part=self.parts[name])
                for name, values in ranked.items()
            }
        return {name: mask & before[name] for name, mask in chosen.items()}

    def counts(self, sparsity: float | None) -> dict[str, int]:
        """How many weights each layer keeps."""
        if not isinstance(self.structure, NM):
            return allocate(self.allocation, self.shapes, sparsity)
        self.structure.check_sparsity(sparsity)
        return {s.name: self.structure.fixed_count(s.shape) for s in self.shapes}


def _lowest(values: Tensor) -> float:
    """The smallest value, or 0."""
    return min(float(values.min()), 0.0) if values.numel() else 0.0


def sparsity_after(sparsity: float | None, share: float) -> float | None:
    """The density falls by the same factor in each round (Tanaka et al. 2020, algorithm 1)."""
    if sparsity is None or share == 1:
        return sparsity
    return float(1 - (1 - sparsity) ** share)


@torch.no_grad()
def zero(candidates: Sequence[Candidate], masks: Mapping[str, Tensor]) -> None:
    """Set what is pruned to 0, of what is here."""
    for candidate in candidates:
        here = part_of(candidate.name, candidate.param).held(candidate.param)
        here.masked_fill_(~masks[candidate.name], 0.0)
