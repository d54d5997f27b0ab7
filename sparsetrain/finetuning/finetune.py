"""Learning rates for training on after pruning: a share of the original, its last, or a rewind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from sparsetrain.config import Config
from sparsetrain.finetuning.rates import Original, first_rates, rates_of

Rule = Literal["scaled", "last", "rewind"]


class Finetune(Config):
    """How fast a network learns after it was pruned, and for how long.

    Fine-tuning and learning-rate rewinding are as in Renda, Frankle & Carbin 2020, "Comparing
    rewinding and fine-tuning in neural network pruning", section 2. (Their third way, rewinding
    weights too, is `rewind_to` of `st.prune_iteratively`.)
    """

    rule: Rule = Field(
        default="scaled",
        description="scaled: `factor` times the rate that the original training began with; last: "
        "the rate of its last step; rewind: the rates of its last `steps` once more.",
    )
    factor: float | None = Field(
        default=None, gt=0, le=1, description="Share in (0, 1], for scaled; null is 0.1."
    )
    steps: int | None = Field(
        default=None, ge=1, description="Steps to train; null: as many as the original training."
    )
    warmup: int = Field(
        default=0, ge=0, description="Steps over which the rate rises in a straight line."
    )
    shape: Literal["constant", "cosine"] = Field(
        default="constant",
        description="What the rate does after the warm-up: stay, or fall to 0 as a cosine. "
        "rewind has the shape of the original.",
    )

    @model_validator(mode="after")
    def _fields_fit(self) -> Finetune:
        if self.factor is not None and self.rule != "scaled":
            raise ValueError(f"factor={self.factor} needs rule='scaled', not {self.rule!r}")
        if self.shape != "constant" and self.rule == "rewind":
            raise ValueError(
                f"shape={self.shape!r} does not fit rule='rewind', which has the original's shape"
            )
        if self.steps is not None and self.warmup >= self.steps:
            raise ValueError(f"warmup={self.warmup} must be less than steps={self.steps}")
        return self

    def span(self, total: int) -> range:
        """The numbers of the steps to train; after rewinding they are the last of the original.

        Args:
            total: steps of the original training.

        Raises:
            ValueError: the original training is shorter than what is rewound or the warm-up.
        """
        steps = self.steps or total
        if self.rule == "rewind" and steps > total:
            raise ValueError(f"steps={steps} cannot be rewound: the original training has {total}")
        if self.warmup >= steps:
            raise ValueError(f"warmup={self.warmup} must be less than the {steps} steps to train")
        return range(total - steps, total) if self.rule == "rewind" else range(steps)

    def scheduler(
        self, optimizer: Optimizer, total: int, original: Original | None = None
    ) -> LRScheduler:
        """A torch scheduler, whose `step` is called once a training step.

        Args:
            optimizer: with the rates that the original training began with, a `SparseOptimizer`
                or any other.
            total: steps of the original training.
            original: makes the original's scheduler on the optimizer that it is given; it is run
                on a stand-in to read its rates. None: they were constant.

        Raises:
            ValueError: as `span`; rates cannot be read from `original`.
        """
        return _Rates(optimizer, self._rates(optimizer, total, original))

    def _rates(self, optimizer: Optimizer, total: int, original: Original | None) -> _Curve:
        """For each step the rates of all groups, with warm-up."""
        span = self.span(total)
        if self.rule == "scaled":
            share = 0.1 if self.factor is None else self.factor
            curve = [[share * rate for rate in first_rates(optimizer)]] * len(span)
        else:
            known = rates_of(optimizer, total, original)
            curve = known[span.start :] if self.rule == "rewind" else [known[-1]] * len(span)
        shares = [self._share(step, len(span)) for step in range(len(span))]
        return [[share * rate for rate in at] for share, at in zip(shares, curve, strict=True)]

    def _share(self, step: int, steps: int) -> float:
        """What warm-up and shape leave of the rate."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if self.shape == "constant":
            return 1.0
        progress = (step - self.warmup) / (steps - self.warmup)
        return (1 + math.cos(math.pi * progress)) / 2


_Curve = Sequence[Sequence[float]]


class _Rates(LRScheduler):
    """Rates by a table, [steps, groups]; the last ones from its end on."""

    def __init__(self, optimizer: Optimizer, rates: _Curve) -> None:
        self.rates = rates
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        """The rates of the step to come."""
        return list(self.rates[min(self.last_epoch, len(self.rates) - 1)])

    def state_dict(self) -> dict[str, Any]:
        """The place in the table, not the table."""
        return {name: value for name, value in super().state_dict().items() if name != "rates"}
