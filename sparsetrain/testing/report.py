"""What a check tells when everything held."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """One invariant with one optimizer.

    Attributes:
        invariant: its name.
        optimizer: name of the optimizer; empty for scores, which need none.
        left_out: why it says nothing here; None where it held.
    """

    invariant: str
    optimizer: str = ""
    left_out: str | None = None


@dataclass(frozen=True)
class Report:
    """What was looked at; all of it held, else there is no report. Print it to see it.

    Attributes:
        subject: what was checked, in words.
        outcomes: in the order in which they were found.
    """

    subject: str
    outcomes: tuple[Outcome, ...]

    @property
    def held(self) -> tuple[str, ...]:
        """Names of the invariants that held, with at least one optimizer."""
        return tuple(dict.fromkeys(o.invariant for o in self.outcomes if o.left_out is None))

    @property
    def left_out(self) -> dict[str, str]:
        """Names of the invariants that say nothing here with any optimizer -> why."""
        found = {o.invariant: o.left_out for o in self.outcomes if o.left_out is not None}
        return {name: why for name, why in found.items() if name not in self.held}

    def __str__(self) -> str:
        lines = [f"{self.subject}: {len(self.held)} invariants hold"]
        lines += [f"  {name}" for name in self.held]
        lines += [f"  {name}: left out, {why}" for name, why in self.left_out.items()]
        return "\n".join(lines)
