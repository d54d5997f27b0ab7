"""SparseGPT on a whole model, block after block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrain.allocation import Allocation, LayerShape, allocate, parse_allocation
from sparsetrain.batches import Adapter
from sparsetrain.calibration import Calibration, in_float
from sparsetrain.candidates import Candidate, choose, unwrapped
from sparsetrain.convolution import padded_input
from sparsetrain.pruning.result import PruneResult
from sparsetrain.pruning.sequence import stages, weights_back
from sparsetrain.pruning.surgeon import inverse_root, surgery
from sparsetrain.structures import NM, Structure, Unstructured, parse_structure

_WHO = "method 'sparsegpt'"


@torch.no_grad()
def sparsegpt(
    model: nn.Module,
    sparsity: float | None,
    calibration: Iterable[Any],
    *,
    structure: Structure | str | Mapping[str, Any] = "unstructured",
    allocation: Allocation | str | Mapping[str, Any] = "uniform",
    blocks: str | Sequence[str] = "auto",
    match: str | Sequence[str] | None = None,
    damping: float = 0.01,
    block_size: int = 128,
    adapter: Adapter | None = None,
    progress: bool = False,
) -> PruneResult:
    """Prune every layer so that its outputs change least, and let the kept weights make up for it.

    Frantar & Alistarh 2023, "SparseGPT: massive language models can be accurately pruned in
    one-shot". Each block of the network sees inputs that earlier blocks have made after they were
    pruned. The model itself does not change until `apply` or `hold`.

    Args:
        sparsity: share of zeros in [0, 1); None where `allocation` or n:m sets it.
        calibration: batches of inputs, read once a block: a list or a DataLoader of (inputs,
            targets) or of inputs, or what `adapter` makes that of. Targets are not looked at.
        structure: "unstructured" or n:m, such as "2:4".
        allocation: density of each layer; OWL's go here.
        blocks: glob or globs on modules that are pruned one after the other; "auto" takes the
            members of the model's largest ModuleList or Sequential.
        match: glob or globs on names of weights or modules; all Linear and Conv weights that
            train when None.
        damping: share of the mean of the Hessian's diagonal that is added to it; ten and a hundred
            times as much is tried before giving up.
        block_size: columns whose mask is chosen together.
        progress: whether to show a bar.

    Returns:
        Masks and new weights.

    Raises:
        ValueError: arguments that do not fit each other or the model, data that are missing or do
            not reach a layer, a Hessian that is not positive definite.
    """
    model = unwrapped(model)
    candidates = choose(model, match)
    keep = _places(candidates, sparsity, parse_structure(structure), parse_allocation(allocation))
    given = Calibration(calibration, adapter=adapter, progress=progress)
    given.require_rereadable(_WHO)
    masks: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    with weights_back(candidates):
        for stage in stages(model, candidates, blocks):
            hessians = _hessians(model, stage, given)
            for candidate in stage:
                name = candidate.name
                weights[name], masks[name] = _operate(
                    candidate, hessians[name], keep[name], damping, block_size
                )
                candidate.param.copy_(weights[name])
    order = [candidate.name for candidate in candidates]
    return PruneResult(
        model, {n: masks[n] for n in order}, "sparsegpt", {n: weights[n] for n in order}
    )


def _places(
    candidates: Sequence[Candidate],
    sparsity: float | None,
    structure: Structure,
    allocation: Allocation,
) -> dict[str, int | NM]:
    """How many weights each layer keeps, or n:m."""
    if isinstance(structure, NM):
        structure.check_sparsity(sparsity)
        for candidate in candidates:
            structure.check(tuple(candidate.param.shape), candidate.name)
            if candidate.param.dim() > 2:
                raise ValueError(
                    f"sparsegpt has no n:m for the convolution {candidate.name}: leave it out "
                    "with match"
                )
        return {candidate.name: structure for candidate in candidates}
    if not isinstance(structure, Unstructured):
        raise ValueError(f"sparsegpt has no {structure!r}: give 'unstructured' or n:m")
    shapes = [LayerShape(c.name, tuple(c.param.shape)) for c in candidates]
    return dict(allocate(allocation, shapes, sparsity))


def _hessians(
    model: nn.Module, stage: Sequence[Candidate], calibration: Calibration
) -> dict[str, Tensor]:
    """Sums of x x' over all positions: [groups, inputs, inputs] for each layer."""
    sums: dict[str, Tensor] = {}

    def see(candidate: Candidate, given: Tensor, output: Tensor) -> None:
        columns = _columns(candidate, in_float(given))
        product = columns.transpose(1, 2) @ columns
        known = sums.get(candidate.name)
        sums[candidate.name] = product if known is None else known.add_(product)

    calibration.watch(model, stage, _WHO, see)
    return sums


def _columns(candidate: Candidate, given: Tensor) -> Tensor:
    """What each row of the weight is multiplied with: [groups, positions, inputs]."""
    module: Any = candidate.owners[0]
    if isinstance(module, nn.Linear):
        return given.reshape(1, -1, given.shape[-1])
    if not isinstance(module, nn.Conv2d):
        raise ValueError(f"sparsegpt knows Linear and Conv2d layers, not that of {candidate.name}")
    padded, padding = padded_input(module, given)
    unfolded = F.unfold(padded, module.kernel_size, module.dilation, padding, module.stride)
    by_group = unfolded.reshape(len(given), module.groups, -1, unfolded.shape[2])
    columns: Tensor = by_group.permute(1, 0, 3, 2).flatten(1, 2)
    return columns


def _operate(
    candidate: Candidate, hessians: Tensor, keep: int | NM, damping: float, block_size: int
) -> tuple[Tensor, Tensor]:
    """The new weight of a layer and its mask, group by group of a convolution."""
    name, shape = candidate.name, candidate.param.shape
    rows = candidate.param.detach().flatten(1).to(hessians.dtype)
    parts = rows.chunk(len(hessians))
    found, left = [], keep
    for number, (part, hessian) in enumerate(zip(parts, hessians, strict=True)):
        share = left if isinstance(left, NM) else round(left / (len(parts) - number))
        root = inverse_root(hessian, damping, name=name)
        dead = hessian.diagonal() == 0
        found.append(surgery(part, root, share, name=name, dead=dead, block=block_size))
        if not isinstance(left, NM) and not isinstance(share, NM):
            left -= share
    weight = torch.cat([new for new, _ in found]).reshape(shape).to(candidate.param.dtype)
    return weight, torch.cat([mask for _, mask in found]).reshape(shape)
