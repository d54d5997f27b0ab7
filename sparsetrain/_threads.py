"""Two or more threads for passes over large tensors that numpy or torch make with one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count, pairwise
from typing import TypeVar

import torch

ResultT = TypeVar("ResultT")

# Below this many elements handing half of the work to a second thread costs more than it saves.
_PARALLEL_FROM = 1 << 19
_MOST = 8
_PIECES_A_THREAD = 8

_pool: ThreadPoolExecutor | None = None


def _forget_pool() -> None:
    global _pool
    _pool = None


# A forked child inherits the pool object but not its threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def pieces(length: int) -> list[slice]:
    """Cut `length` elements into slices, several for each thread, or one if they are few."""
    number = _PIECES_A_THREAD * _threads() if length >= _PARALLEL_FROM and _threads() > 1 else 1
    cuts = [length * i // number for i in range(number + 1)]
    return [slice(start, stop) for start, stop in pairwise(cuts)]


def share_out(work: Callable[[slice], ResultT], parts: Sequence[slice]) -> list[ResultT]:
    """`work` on every slice, by as many threads as torch has; its results in order.

    Only for work that leaves the interpreter for long, as numpy and torch do on large arrays.
    """
    global _pool
    if len(parts) == 1:
        return [work(parts[0])]
    if _pool is None:
        _pool = ThreadPoolExecutor(max_workers=_MOST - 1, thread_name_prefix="sparsetrain")
    results: dict[int, ResultT] = {}
    numbers = count()

    # Each thread takes the next slice when it is done with one: torch's own threads spin for a
    # while after their work, and whoever shares a core with one is slow.
    def take_some() -> None:
        while (number := next(numbers)) < len(parts):
            results[number] = work(parts[number])

    helpers = [_pool.submit(take_some) for _ in range(_threads() - 1)]
    take_some()
    for helper in helpers:
        helper.result()
    return [results[number] for number in range(len(parts))]


def _threads() -> int:
    return min(torch.get_num_threads(), _MOST)


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """As many threads of torch, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
