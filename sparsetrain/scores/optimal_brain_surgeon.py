"""Optimal brain surgeon: 1/2 w^2 / [F^-1]_qq."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from sparsetrain.calibration import Calibration, require_reached
from sparsetrain.candidates import Candidate
from sparsetrain.curvature import iterate_per_sample_gradients
from sparsetrain.curvature.inverse import FisherBlocks
from sparsetrain.distributed.averaging import Ranks
from sparsetrain.scores.base import Needs, Scope, Score


class OptimalBrainSurgeon(Score):
    """1/2 w^2 / [F^-1]_qq, the loss that removing w costs when other weights make up for it.

    Hassibi & Stork 1993, "Second order derivatives for network pruning: optimal brain surgeon",
    with blocks of the damped empirical Fisher matrix for the Hessian, as in Singh & Alistarh 2020,
    "WoodFisher", eq. 6. `st.optimal_brain_surgeon` also changes the weights that are kept.
    """

    kind: Literal["optimal_brain_surgeon"] = "optimal_brain_surgeon"
    data: ClassVar[Needs] = "loss"
    scope: ClassVar[Scope] = "global"

    block: int = Field(50, ge=1, description="consecutive weights that make up for each other")
    damping: float = Field(1e-5, gt=0, description="added to the Fisher matrix's diagonal")
    gradients: Literal["sample", "batch"] = Field(
        "sample",
        description="what the Fisher matrix is a mean over: 'batch' takes the mean gradient of "
        "each batch for one, as WoodFisher's authors do; faster, for many small batches",
    )

    @property
    def needs_whole(self) -> str | None:
        """Blocks go across the borders of shards."""
        return "takes blocks of the Fisher matrix that go across shards"

    def measure(
        self, model: nn.Module, candidates: Sequence[Candidate], calibration: Calibration
    ) -> dict[str, Tensor]:
        """1/2 w^2 / [F^-1]_qq, of the weight's shape."""
        inverses = self.inverse_blocks(model, candidates, calibration)
        return {c.name: saliency(c.param.detach(), inverses[c.name]) for c in candidates}

    def inverse_blocks(
        self,
        model: nn.Module,
        candidates: Sequence[Candidate],
        calibration: Calibration,
        masks: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Name -> inverses of the Fisher matrix's blocks, [blocks, block, block].

        Args:
            masks: gradients count as 0 where False, so that no weight makes up for those.

        Raises:
            ValueError: data are missing, not finite or do not reach a weight.
        """
        names = [candidate.name for candidate in candidates]
        sums = {name: _SharedBlocks(self.block) for name in names}
        reached: set[str] = set()
        for gradients in self._gradients(model, candidates, calibration):
            for name, rows in gradients.items():
                if rows.any():
                    reached.add(name)
                kept = rows if masks is None else rows * masks[name]
                sums[name].add(kept.flatten(1))
        ranks = calibration.ranks
        require_reached(names, ranks.seen_by(names, reached, every=False), self.title)
        if self.gradients == "sample":  # those of batches are of all ranks already
            for name in names:
                sums[name].add_up(ranks)
        return {name: sums[name].inverse(self.damping) for name in names}

    def _gradients(
        self, model: nn.Module, candidates: Sequence[Candidate], calibration: Calibration
    ) -> Iterator[dict[str, Tensor]]:
        """Name -> [rows, *shape]."""
        batches, loss_fn = calibration.given(self.title)
        names = [candidate.name for candidate in candidates]
        if self.gradients == "sample":
            yield from iterate_per_sample_gradients(
                model, batches, loss_fn, parameters=names, **calibration.options
            )
            return
        for size, sums in calibration.gradients(model, candidates, self.title):
            yield {name: (total / size).unsqueeze(0) for name, total in sums.items()}


class _SharedBlocks(FisherBlocks):
    """Sums of g g' that ranks have parts of."""

    def add_up(self, ranks: Ranks) -> None:
        """Let every rank have all of it."""
        if self._sums is not None:
            self._sums = ranks.sum(self._sums)
        (self.rows,) = ranks.totals(self.rows)


def saliency(weight: Tensor, inverses: Tensor) -> Tensor:
    """1/2 w^2 / [F^-1]_qq, of the weight's shape."""
    diagonal = inverses.diagonal(dim1=1, dim2=2).reshape(-1)[: weight.numel()]
    return 0.5 * weight.square() / diagonal.reshape(weight.shape)
