"""A cheap proof, for use in the field, that all ranks hold the same masks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from sparsetrain.storage.bits import pack_rows

if TYPE_CHECKING:
    from sparsetrain.optimizer import SparseOptimizer
    from sparsetrain.targets import SparseTarget

_Words = NDArray[Any]
# Odd constants of splitmix64 (Steele et al. 2014), which spreads every bit over all others.
_STEP, _MIX_1, _MIX_2 = (
    np.uint64(constant) for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


@torch.no_grad()
def check_masks(optimizer: SparseOptimizer, group: Any = None) -> dict[str, int]:
    """Raise an error unless all ranks hold the same masks, clock and random state.

    Every rank has to call it at the same step. It sends 8 bytes a layer, twice. Of a sharded weight
    the shards' fingerprints add up, so that it also compares replicas with each other, and runs on
    different numbers of ranks.

    Args:
        group: the process group to compare within; all processes when None.

    Returns:
        Name of a weight -> fingerprint of its mask, 64 bits.

    Raises:
        RuntimeError: naming what differs, and on how this rank has it. Every rank raises.
    """
    optimizer._require_live()
    fingerprints = {name: _fingerprint(target) for name, target in optimizer.targets.items()}
    keeper = optimizer._keeper
    state = keeper.generator.get_state()
    own = {
        "the number of steps": optimizer.step_count,
        "the random state": _signed(_hash(state.numpy()[None], 0)),
        **{f"the mask of {name}": value for name, value in fingerprints.items()},
    }
    if dist.is_available() and dist.is_initialized():
        _compare(own, group)
    return {name: value % (1 << 64) for name, value in fingerprints.items()}


def _compare(own: dict[str, int], group: Any) -> None:
    # The number of entries first, because vectors of different lengths cannot be compared.
    low, high = _extremes([len(own)], group)
    if low != high:
        raise RuntimeError(
            f"ranks hold different numbers of sparse weights, from {low[0] - 2} to {high[0] - 2} "
            f"(this one {len(own) - 2}): build the optimizer with the same recipe on every rank"
        )
    low, high = _extremes(list(own.values()), group)
    differing = [what for what, a, b in zip(own, low, high, strict=True) if a != b]
    if differing:
        raise RuntimeError(
            f"ranks disagree on {', '.join(differing)}, at step {own['the number of steps']} of "
            "this one: give every rank the same seed, call the same methods on all of them, and "
            "load the same checkpoint"
        )


def _extremes(values: list[int], group: Any) -> tuple[list[int], list[int]]:
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    low = torch.tensor(values, device=device)
    high = low.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN, group=group)
    dist.all_reduce(high, dist.ReduceOp.MAX, group=group)
    return low.tolist(), high.tolist()


def _fingerprint(target: SparseTarget) -> int:
    """Of the whole mask; rows add up, in arithmetic modulo 2^64."""
    mask = target.held_mask
    here = _hash(pack_rows(mask).cpu().numpy(), target.part.first_row) if mask.numel() else 0
    return int(target.part.sum(torch.tensor([_signed(here)]))[0])


def _hash(rows: NDArray[np.uint8], first_row: int) -> int:
    """A number of 64 bits for bytes [rows, columns], that depends on where each of them is."""
    count, width = rows.shape
    padded = np.zeros((count, -(-width // 8) * 8), dtype=np.uint8)
    padded[:, :width] = rows
    words: _Words = padded.view(np.dtype(np.uint64))
    places = np.arange(1, words.shape[1] + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        of_rows: _Words = _mix(words + places * _STEP).sum(axis=1, dtype=np.uint64)
        numbers = np.arange(first_row + 1, first_row + count + 1, dtype=np.uint64)
        mixed: _Words = _mix(of_rows + numbers * _MIX_1)
        return int(mixed.sum(dtype=np.uint64))


def _mix(words: _Words) -> _Words:
    words = (words ^ (words >> np.uint64(30))) * _MIX_1
    words = (words ^ (words >> np.uint64(27))) * _MIX_2
    mixed: _Words = words ^ (words >> np.uint64(31))
    return mixed


def _signed(value: int) -> int:
    """The same 64 bits as a signed integer, which torch adds up modulo 2^64."""
    return value - (1 << 64) if value >> 63 else value
