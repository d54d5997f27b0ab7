"""Two or more threads for passes over large tensors that numpy or torch make with one."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TypeVar

import torch

ResultT = TypeVar("ResultT")

# Below this many elements handing half of the work to a second thread costs more than it saves.
_PARALLEL_FROM = 1 << 19
_MOST = 8

_pool: ThreadPoolExecutor | None = None


def _forget_pool() -> None:
    global _pool
    _pool = None


# A forked child inherits the pool object but not its threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def pieces(length: int, numel: int) -> list[slice]:
    """Cut `length` rows that hold `numel` elements into as many slices as threads are worth it."""
    threads = min(torch.get_num_threads(), _MOST)
    if numel < _PARALLEL_FROM or length < threads:
        threads = 1
    cuts = [length * number // threads for number in range(threads + 1)]
    return [slice(start, stop) for start, stop in pairwise(cuts)]


def share_out(work: Callable[[slice], ResultT], parts: Sequence[slice]) -> list[ResultT]:
    """`work` on every slice at the same time; its results in order.

    Only for work that leaves the interpreter for long, as numpy and torch do on large arrays.
    """
    global _pool
    if len(parts) == 1:
        return [work(parts[0])]
    if _pool is None:
        _pool = ThreadPoolExecutor(max_workers=_MOST - 1, thread_name_prefix="sparsetrain")
    waiting = [_pool.submit(work, part) for part in parts[1:]]
    first = work(parts[0])
    return [first, *(job.result() for job in waiting)]
