"""What is compared: methods of one-shot pruning, and how much they prune."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

import sparsetrain as st
from reference_runs.char_transformer.model import PRUNED


@dataclass(frozen=True)
class Pattern:
    """How many weights go, and among what."""

    sparsity: float
    structure: str = "unstructured"


@dataclass(frozen=True)
class Method:
    """One way to choose weights.

    Attributes:
        kind: "magnitude", "wanda" or "sparsegpt".
        by_blocks: whether a block is looked at after those before it were pruned.
        owl: whether OWL says how many weights each block keeps; all keep as many otherwise.
    """

    label: str
    kind: str
    by_blocks: bool = False
    owl: bool = False

    @property
    def looks_at_data(self) -> bool:
        """Whether calibration windows change what it does."""
        return self.owl or self.kind != "magnitude"

    def takes(self, pattern: str) -> bool:
        """Whether it is run: OWL is for the highest sparsity."""
        return not self.owl or pattern == OWL_AT


PATTERNS = {
    "50 %": Pattern(0.5),
    "60 %": Pattern(0.6),
    "70 %": Pattern(0.7),
    "2:4": Pattern(0.5, "2:4"),
}
OWL_AT = "70 %"

METHODS = {
    "magnitude": Method("Magnitude", "magnitude"),
    "wanda_at_once": Method("Wanda, all blocks at once", "wanda"),
    "wanda": Method("Wanda", "wanda", by_blocks=True),
    "sparsegpt": Method("SparseGPT", "sparsegpt", by_blocks=True),
    "magnitude_owl": Method("Magnitude, OWL", "magnitude", owl=True),
    "wanda_owl": Method("Wanda, OWL", "wanda", by_blocks=True, owl=True),
    "sparsegpt_owl": Method("SparseGPT, OWL", "sparsegpt", by_blocks=True, owl=True),
}


def prune(
    model: nn.Module, method: Method, pattern: Pattern, windows: list[Tensor]
) -> st.PruneResult:
    """What a method keeps of the Linear weights in the blocks. The model does not change."""
    options: dict[str, Any] = {"structure": pattern.structure, "match": PRUNED}
    # n:m and an allocation set the sparsity themselves.
    sparsity = pattern.sparsity if pattern.structure == "unstructured" else None
    if method.owl:
        options["allocation"] = st.owl(model, pattern.sparsity, windows, match=PRUNED)
        sparsity = None
    if method.kind == "sparsegpt":
        return st.sparsegpt(model, sparsity, windows, **options)
    if method.kind == "magnitude":
        return st.prune(model, st.Magnitude(), sparsity, **options)
    if method.by_blocks:
        options["blocks"] = "auto"
    return st.prune(model, st.Wanda(), sparsity, calibration=windows, **options)
