"""How long the active weights have been active."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from sparsetrain.report.events import UpdateEvent

if TYPE_CHECKING:
    from sparsetrain.optimizer import SparseOptimizer


_ORIGINAL = -1  # birth of the weights that were there before the first step


@dataclass(frozen=True)
class AgeRecord:
    """After the mask update at `step`: the mean age of the active weights, in steps, and the share
    of the active weights that were so from the beginning without a break."""

    step: int
    mean_age: float
    original: float


class MaskAges:
    """Follows a `SparseOptimizer` and records the age of its active weights at each mask update.

    Keeps one int32 and one bool a weight, so it is meant for studies rather than for the largest
    networks. A weight that loses channels starts over. `records` holds the results; `close()` stops
    following.
    """

    def __init__(self, optimizer: SparseOptimizer) -> None:
        self._optimizer = optimizer
        self._masks = optimizer.masks()
        self._births = {
            name: torch.full(mask.shape, _ORIGINAL, dtype=torch.int32, device=mask.device)
            for name, mask in self._masks.items()
        }
        self.records: list[AgeRecord] = []
        self._handle = optimizer.register_update_hook(self._on_update)

    def close(self) -> None:
        """Stop following the optimizer; the records stay."""
        self._handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on after a resume."""
        return {
            "births": dict(self._births),
            "records": [asdict(record) for record in self.records],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; load the optimizer's own state first."""
        self._births = {name: births.clone() for name, births in state["births"].items()}
        self._masks = self._optimizer.masks()
        self.records = [AgeRecord(**record) for record in state["records"]]

    def _on_update(self, event: UpdateEvent) -> None:
        total, active, original = 0, 0, 0
        for name, mask in self._optimizer.masks().items():
            births = self._births[name]
            if births.shape != mask.shape:  # it has lost channels, so all ages begin again
                births = torch.full_like(mask, event.step, dtype=torch.int32)
                self._births[name] = births
            else:
                births[mask & ~self._masks[name]] = event.step
            self._masks[name] = mask
            kept = births[mask]
            total += int((event.step - kept.clamp(min=0)).sum(dtype=torch.int64))
            active += kept.numel()
            original += int(torch.count_nonzero(kept == _ORIGINAL))
        share = max(active, 1)
        self.records.append(AgeRecord(event.step, total / share, original / share))
