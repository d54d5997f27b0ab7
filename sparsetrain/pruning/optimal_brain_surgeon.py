"""Optimal brain surgeon on a whole model: kept weights make up for pruned ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparsetrain.allocation import Allocation
from sparsetrain.batches import Adapter
from sparsetrain.calibration import Calibration
from sparsetrain.candidates import Candidate, choose, unwrapped
from sparsetrain.curvature.inverse import in_blocks
from sparsetrain.curvature.losses import LossFunction
from sparsetrain.pruning.one_shot import Plan, sparsity_after
from sparsetrain.pruning.result import PruneResult
from sparsetrain.pruning.sequence import weights_back
from sparsetrain.scores import OptimalBrainSurgeon
from sparsetrain.scores.base import Scope
from sparsetrain.scores.optimal_brain_surgeon import saliency
from sparsetrain.structures import Structure, parse_structure

Update = Literal["joint", "separate"]


def optimal_brain_surgeon(
    model: nn.Module,
    sparsity: float | None,
    calibration: Iterable[Any],
    loss_fn: LossFunction,
    *,
    score: OptimalBrainSurgeon | None = None,
    update: Update = "joint",
    rounds: int = 1,
    scope: Scope | None = None,
    structure: Structure | str | Mapping[str, Any] = "unstructured",
    allocation: Allocation | str | Mapping[str, Any] | None = None,
    match: str | Sequence[str] | None = None,
    adapter: Adapter | None = None,
    progress: bool = False,
) -> PruneResult:
    """Prune the weights that cost least, and change the kept ones to make up for them.

    Singh & Alistarh 2020, "WoodFisher: efficient second-order approximation for neural network
    compression". The model itself does not change until `apply` or `hold`.

    Args:
        sparsity: share of zeros over all chosen weights, in [0, 1); None where `allocation` or an
            n:m structure sets it.
        calibration: batches, read once a round; as for `st.prune`.
        score: block size, damping and gradients; `OptimalBrainSurgeon()` when None.
        update: "joint" makes up for all pruned weights of a block together, which minimises the
            quadratic model of the loss; "separate" adds up what each asks for by itself (their
            section 4), which is the same where a block loses one weight.
        rounds: how often the Fisher matrix is measured; the density falls by the same factor in
            each round.
        scope, structure, allocation, match, adapter: as for `st.prune`.

    Returns:
        Masks and new weights.

    Raises:
        ValueError: arguments that do not fit each other or the model, data that are missing or do
            not reach a weight.
    """
    if rounds < 1 or update not in ("joint", "separate"):
        raise ValueError(
            f"rounds={rounds} must be 1 or more, and update={update!r} 'joint' or 'separate'"
        )
    model = unwrapped(model)
    chosen = OptimalBrainSurgeon() if score is None else score
    candidates = choose(model, match)
    given = Calibration(calibration, loss_fn, adapter, progress=progress)
    given.require(chosen.title)
    if rounds > 1:
        given.require_rereadable(chosen.title)
    plan = Plan(candidates, scope or chosen.scope, parse_structure(structure), allocation)
    masks = {c.name: c.param.detach() != 0 for c in candidates}
    with weights_back(candidates):
        for number in range(1, rounds + 1):
            inverses = chosen.inverse_blocks(model, candidates, given, masks)
            scores = {c.name: saliency(c.param.detach(), inverses[c.name]) for c in candidates}
            masks = plan.masks(scores, masks, sparsity_after(sparsity, number / rounds))
            _operate(candidates, masks, inverses, update)
        weights = {c.name: c.param.detach().clone() for c in candidates}
    return PruneResult(model, masks, chosen.kind, weights)


@torch.no_grad()
def _operate(
    candidates: Sequence[Candidate],
    masks: Mapping[str, Tensor],
    inverses: Mapping[str, Tensor],
    update: Update,
) -> None:
    for candidate in candidates:
        mask, weight = masks[candidate.name], candidate.param
        weight.add_(compensation(weight, mask, inverses[candidate.name], update))
        weight.masked_fill_(~mask, 0.0)  # exactly


def compensation(weight: Tensor, mask: Tensor, inverses: Tensor, update: Update) -> Tensor:
    """What is added to the weights of each block so that its pruned ones are 0.

    With Q the pruned weights of a block: -F^-1[:, Q] (F^-1[Q, Q])^-1 w_Q (Hassibi & Stork 1993,
    eq. 5, for several weights), or with the diagonal of F^-1 alone for the inverse.

    Args:
        weight: of any shape.
        mask: bool, of the same shape.
        inverses: F^-1, [blocks, block, block].

    Returns:
        Of the weight's shape.
    """
    block = inverses.shape[1]
    gone = in_blocks((~mask).reshape(-1), block)
    pruned = in_blocks(weight.reshape(-1), block).to(inverses.dtype) * gone
    diagonal = inverses.diagonal(dim1=1, dim2=2)
    if update == "separate":
        forces = pruned / diagonal
    else:
        among = gone.unsqueeze(1) & gone.unsqueeze(2)
        system = torch.where(among, inverses, torch.diag_embed((~gone).to(inverses.dtype)))
        root = torch.linalg.cholesky(system.double())
        forces = torch.cholesky_solve(pruned.double().unsqueeze(2), root).squeeze(2)
        forces = forces.to(inverses.dtype)
    change = -(inverses @ forces.unsqueeze(2)).reshape(-1)[: weight.numel()]
    return change.reshape(weight.shape).to(weight.dtype)
