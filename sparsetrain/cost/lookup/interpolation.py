"""Values between measured points."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence


def _place(points: Sequence[float], x: float) -> tuple[int, float]:
    """The point before x and the share of the way to the next; the nearest end where outside."""
    x = min(max(x, points[0]), points[-1])
    at = min(bisect_right(points, x) - 1, max(len(points) - 2, 0))
    if len(points) == 1:
        return 0, 0.0
    return at, (x - points[at]) / (points[at + 1] - points[at])


class Curve:
    """Linear between points, constant beyond the ends."""

    def __init__(self, values: Mapping[float, float]) -> None:
        self.points = sorted(values)
        self.values = [values[point] for point in self.points]

    def __call__(self, x: float) -> float:
        """The value at x."""
        at, share = _place(self.points, x)
        here = self.values[at]
        return here + share * (self.values[at + 1] - here) if share else here


class Grid:
    """Bilinear between the points of a whole grid, constant beyond its sides."""

    def __init__(self, values: Mapping[tuple[int, int], float]) -> None:
        self.rows = sorted({row for row, _ in values})
        columns = sorted({column for _, column in values})
        self.curves = [Curve({c: values[r, c] for c in columns}) for r in self.rows]

    def __call__(self, row: float, column: float) -> float:
        """The value at a place."""
        at, share = _place(self.rows, row)
        here = self.curves[at](column)
        return here + share * (self.curves[at + 1](column) - here) if share else here
