"""Optimal brain damage: 1/2 h w^2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from sparsetrain.calibration import Calibration
from sparsetrain.candidates import Candidate
from sparsetrain.curvature import Diagonal, ggn_diagonal, hessian_diagonal
from sparsetrain.scores.base import Needs, Score
from sparsetrain.scores.fisher import weighted


class OptimalBrainDamage(Score):
    """1/2 h w^2, the loss that removing w costs at a minimum, h being the Hessian's diagonal.

    LeCun et al. 1990, "Optimal brain damage", eq. 5. The h of "ggn" is the Gauss-Newton matrix's,
    which is the Hessian's for networks of ReLU and max-pooling (see `sparsetrain.curvature`).
    Hutchinson's estimates are negative for many weights by noise alone; their size is taken, as
    AdaHessian does (Yao et al. 2021).
    """

    kind: Literal["optimal_brain_damage"] = "optimal_brain_damage"
    data: ClassVar[Needs] = "loss"

    curvature: Literal["ggn", "monte_carlo", "hutchinson", "hessian"] = Field(
        "ggn",
        description="'ggn': a backward pass a class; 'monte_carlo': the same on average, in "
        "`probes` passes; 'hutchinson': the Hessian itself in `probes` products, noisy; 'hessian': "
        "exactly, a product a weight",
    )
    probes: int = Field(1, ge=1, description="of 'monte_carlo' and 'hutchinson'")

    @property
    def needs_whole(self) -> str | None:
        """Its curvature is that of whole layers."""
        return "takes second derivatives or a gradient for each sample"

    def measure(
        self, model: nn.Module, candidates: Sequence[Candidate], calibration: Calibration
    ) -> dict[str, Tensor]:
        """1/2 h w^2, of the weight's shape; negative by the exact Hessian alone."""
        batches, loss_fn = calibration.given(self.title)
        compute: Callable[..., Diagonal]
        options: dict[str, Any] = {"seed": calibration.seed, **calibration.options}
        if self.curvature in ("ggn", "monte_carlo"):
            compute = ggn_diagonal
            options["estimate"] = "exact" if self.curvature == "ggn" else "monte_carlo"
        else:
            compute = hessian_diagonal
            options["estimate"] = "exact" if self.curvature == "hessian" else "hutchinson"
        names = [candidate.name for candidate in candidates]
        diagonal = compute(model, batches, loss_fn, parameters=names, probes=self.probes, **options)
        means = calibration.ranks.mean(diagonal, diagonal.samples)
        if self.curvature == "hutchinson":
            return weighted(candidates, {n: h.abs() for n, h in means.items()}, self.title)
        return weighted(candidates, means, self.title)
