"""Progress bars."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

Item = TypeVar("Item")


def tracked(items: Iterable[Item], words: str, *, progress: bool = True) -> Iterator[Item]:
    """The items, with a bar that says how many are done and how long it took.

    Args:
        words: what the bar is called.
        progress: whether there is a bar at all.
    """
    if not progress:
        yield from items
        return
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    total = len(items) if isinstance(items, Sized) else None
    with Progress(
        *Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn()
    ) as bar:
        yield from bar.track(items, total=total, description=words)
