"""What iterative pruning leaves behind: the result of each training run, in memory and on disk."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from sparsetrain.keeping import first_difference, whole_file
from sparsetrain.pruning.result import PruneResult
from sparsetrain.report.text import as_text
from sparsetrain.storage.bits import pack_mask, unpack_mask


@dataclass(frozen=True)
class TrainedRound:
    """One training run.

    Attributes:
        number: of the round; 0 is before any pruning.
        control: "fresh" or "random", or None for the network itself.
        metrics: what the training function returned.
        masks: name -> bool tensor, True where kept.
    """

    number: int
    control: str | None
    metrics: Any
    masks: dict[str, Tensor]

    @property
    def sparsity(self) -> float:
        """Share of zeros over all masks, in [0, 1]."""
        kept = sum(int(mask.count_nonzero()) for mask in self.masks.values())
        return 1 - kept / sum(mask.numel() for mask in self.masks.values())


@dataclass(frozen=True)
class IterativeResult:
    """All training runs of `st.prune_iteratively`, in their order.

    Attributes:
        model: as the last round has left it.
        rounds: one entry a run, controls after the network whose round they are of.
        score: kind of the score that the masks are by.
    """

    model: nn.Module
    rounds: tuple[TrainedRound, ...]
    score: str

    def of(self, control: str | None) -> list[TrainedRound]:
        """The runs of the network itself (None) or of one control."""
        return [done for done in self.rounds if done.control == control]

    @property
    def last(self) -> PruneResult:
        """The masks of the last round, to hold while training goes on."""
        return PruneResult(self.model, self.of(None)[-1].masks, self.score)

    def to_list(self) -> list[dict[str, Any]]:
        """Plain data, ready for JSON: everything but the masks."""
        return [
            {
                "round": done.number,
                "control": done.control,
                "sparsity": done.sparsity,
                "metrics": done.metrics,
            }
            for done in self.rounds
        ]

    def __rich__(self) -> Table:
        title = f"pruned by {self.score}, round by round"
        table = Table("network", "metrics", title=title, title_justify="left")
        for heading in ("round", "sparsity"):
            table.add_column(heading, justify="right")
        for done in self.rounds:
            metrics = json.dumps(done.metrics)
            table.add_row(
                done.control or "pruned", metrics, str(done.number), f"{done.sparsity:.2%}"
            )
        return table

    def __str__(self) -> str:
        return as_text(self)


class RoundStore:
    """Keeps finished runs in a folder, so that the same call goes on where it was stopped.

    Args:
        folder: None keeps nothing.
        settings: plain data; the folder of a call with other settings is refused.

    Raises:
        ValueError: the folder has rounds of other settings; the message names one.
    """

    def __init__(self, folder: Path | str | None, settings: dict[str, Any]) -> None:
        self.folder = None if folder is None else Path(folder)
        if self.folder is None:
            return
        if difference := first_difference(self.folder, settings):
            name, known, given = difference
            raise ValueError(
                f"{self.folder} has rounds with {name}={known!r}, and this call has "
                f"{name}={given!r}: give the same, or another folder"
            )

    def load(self, label: str) -> dict[str, Any] | None:
        """What was kept under a label, or None."""
        if self.folder is None or not (self.folder / f"{label}.pt").exists():
            return None
        path = self.folder / f"{label}.pt"
        found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return found

    def save(self, label: str, kept: dict[str, Any]) -> None:
        """Keep plain data under a label, whole or not at all."""
        if self.folder is not None:
            with whole_file(self.folder / f"{label}.pt") as partial:
                torch.save(kept, partial)


def packed(masks: dict[str, Tensor]) -> dict[str, Any]:
    """Masks as bits, with their shapes."""
    return {name: [pack_mask(mask), list(mask.shape)] for name, mask in masks.items()}


def unpacked(bits: dict[str, Any]) -> dict[str, Tensor]:
    """Inverse of `packed`."""
    return {name: unpack_mask(mask, tuple(shape)) for name, (mask, shape) in bits.items()}
