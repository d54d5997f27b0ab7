"""What is raised when something does not hold."""

from __future__ import annotations


class BrokenInvariant(AssertionError):
    """Something that a policy, a score or a model does not keep to.

    Attributes:
        what: is wrong, in words.
        step: of the training run, 0-based; None outside of steps.
        layer: name of the weight; None when it is not about one.
        invariant: name of the function in `INVARIANTS` that found it.
        optimizer: name of the optimizer that was wrapped.
    """

    def __init__(self, what: str, *, step: int | None = None, layer: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.step = step
        self.layer = layer
        self.invariant = ""
        self.optimizer = ""

    def __str__(self) -> str:
        place = []
        if self.layer is not None:
            place.append(f"in {self.layer}")
        if self.step is not None:
            place.append(f"at step {self.step}")
        if self.optimizer:
            place.append(f"with optimizer {self.optimizer!r}")
        return f"{self.invariant or 'broken'} {', '.join(place)}".rstrip() + f": {self.what}"


def require(holds: bool, what: str, *, step: int | None = None, layer: str | None = None) -> None:
    """Raise `BrokenInvariant` unless `holds`; for invariants of your own, too."""
    if not holds:
        raise BrokenInvariant(what, step=step, layer=layer)
