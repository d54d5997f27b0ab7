"""The table that `optimizer.summary()` returns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table

from sparsetrain.report.text import as_text

if TYPE_CHECKING:
    from sparsetrain.policies import Policy
    from sparsetrain.policies.group import TargetGroup


@dataclass(frozen=True)
class SummaryRow:
    """One target: how dense it should be and is."""

    name: str
    policy: str
    shape: tuple[int, ...]
    target_density: float | None
    density: float
    active: int
    total: int
    storage: str
    why: str


@dataclass(frozen=True)
class Summary:
    """All targets at one step; print it, or `rich.print` it for colours."""

    step: int
    rows: tuple[SummaryRow, ...]

    @property
    def sparsity(self) -> float:
        """Share of zeros over all targets, in [0, 1]."""
        return 1 - sum(row.active for row in self.rows) / sum(row.total for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "step": self.step,
            "sparsity": self.sparsity,
            "layers": [{**asdict(row), "shape": list(row.shape)} for row in self.rows],
        }

    def __rich__(self) -> Table:
        title = f"step {self.step}: {self.sparsity:.2%} sparse"
        table = Table(title=title, title_justify="left")
        for heading in ("layer", "policy", "shape"):
            table.add_column(heading)
        for heading in ("target", "density", "active", "weights"):
            table.add_column(heading, justify="right")
        table.add_column("held as")
        for row in self.rows:
            table.add_row(
                row.name,
                row.policy,
                " x ".join(map(str, row.shape)),
                "-" if row.target_density is None else f"{row.target_density:.2%}",
                f"{row.density:.2%}",
                f"{row.active:,}",
                f"{row.total:,}",
                f"{row.storage} ({row.why})" if row.why else row.storage,
            )
        return table

    def __str__(self) -> str:
        return as_text(self)


def summarise(
    groups: Iterable[tuple[Policy, TargetGroup]], step: int, why: Mapping[str, str]
) -> Summary:
    """Collect the summary of all targets, in the order of their groups.

    Args:
        why: name of a weight -> why it is held as it is.
    """
    rows = []
    for policy, group in groups:
        wanted = policy.target_densities(group)
        for target in group.targets:
            rows.append(
                SummaryRow(
                    name=target.name,
                    policy=policy.kind,
                    shape=target.shape,
                    target_density=wanted.get(target.name),
                    density=target.density,
                    active=target.active,
                    total=target.numel,
                    storage=target.storage,
                    why=why.get(target.name, ""),
                )
            )
    return Summary(step, tuple(rows))
