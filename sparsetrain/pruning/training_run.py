"""A training run of iterative pruning, as the training function sees it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from sparsetrain.finetuning.finetune import Finetune
from sparsetrain.finetuning.rates import Original
from sparsetrain.optimizer import SparseOptimizer
from sparsetrain.pruning.result import PruneResult
from sparsetrain.pruning.rewinding import Snapshot, rewind

Control = Literal["fresh", "random"]


@dataclass
class TrainingRun:
    """One training run.

    Attributes:
        model: to train, as the run begins; its pruned weights are 0.
        masks: name -> bool tensor of the weight's shape, True where kept.
        number: of the round; 0 is before any pruning.
        control: "fresh" or "random", or None for the network itself.
        first_step: where the run begins.
        keep_at: the step whose state is kept for later runs; None keeps none.
        begin: what is put back when the run begins.
        kept: the state of step `keep_at`, once the run has passed it.
        finetune: how fast and how long a pruned network is trained; None: as in the first round.
    """

    model: nn.Module
    masks: dict[str, Tensor]
    number: int
    control: Control | None = None
    first_step: int = 0
    keep_at: int | None = None
    begin: Snapshot | None = field(default=None, repr=False)
    kept: Snapshot | None = field(default=None, repr=False)
    finetune: Finetune | None = None
    _scheduled: bool = field(default=False, repr=False)

    def hold(self, optimizer: Optimizer) -> SparseOptimizer:
        """Keep the zeros while `optimizer` trains the other weights."""
        return PruneResult(self.model, self.masks, "round").hold(optimizer)

    def schedule(self, optimizer: Optimizer, original: Original, total: int) -> LRScheduler:
        """The scheduler of the run, whose `step` is called once a training step.

        Args:
            optimizer: the held one.
            original: makes the scheduler of the first round on the optimizer that it is given, such
                as ``lambda optimizer: CosineAnnealingLR(optimizer, 1000)``.
            total: steps of the first round, as for `steps`.

        Returns:
            What `original` makes; with `finetune`, in the rounds after the first, its rates.

        Raises:
            ValueError: as `Finetune.scheduler`.
        """
        self._scheduled = True
        if self.finetune is None:
            return original(optimizer)
        return self.finetune.scheduler(optimizer, total, original)

    def require_schedule(self) -> None:
        """Raise ValueError when `finetune` has no effect."""
        if self.finetune is not None and not self._scheduled:
            raise ValueError(
                "train_fn did not ask run.schedule for its scheduler, so that finetune would have "
                "no effect: do so before run.steps"
            )

    def steps(self, total: int, *stateful: Any) -> Iterator[int]:
        """The numbers of the steps to train, before `total`.

        In the first round they begin at 0, and the state of step `rewind_to` is kept. In later
        rounds that state is put back, and they begin there. With `finetune` later rounds have as
        many steps as it says; after learning-rate rewinding they are the last of `total`.

        Args:
            total: steps of a whole training run, the first.
            stateful: what trains the model and is rewound with it, the same in every run: the held
                optimizer, schedulers, a gradient scaler, the `torch.Generator` of a DataLoader.

        Raises:
            ValueError: there are fewer steps than `rewind_to`; `finetune` does not fit, or the
                scheduler is not from `schedule`.
        """
        self.require_schedule()
        if self.keep_at is not None and total < self.keep_at:
            raise ValueError(f"rewind_to={self.keep_at} is after the last of {total} steps")
        if self.begin is not None and self.begin.states:
            rewind(self.begin, self.model, *stateful)
        span = range(self.first_step, total) if self.finetune is None else self.finetune.span(total)
        for step in span:
            self._keep_if_due(step, stateful)
            yield step
        self._keep_if_due(total, stateful)

    def _keep_if_due(self, step: int, stateful: tuple[Any, ...]) -> None:
        if step == self.keep_at:
            self.kept = Snapshot.take(self.model, *stateful)
