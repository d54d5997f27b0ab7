"""As many threads for numba as torch uses. Importing this needs numba."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numba
import torch

_CHUNKS_A_THREAD = 4
_MOST: int = numba.config.NUMBA_NUM_THREADS
# numba's simplest threading layer, used where OpenMP is missing, dies when it is entered twice.
_one_at_a_time = threading.Lock()
_local = threading.local()


@contextmanager
def numba_chunks() -> Iterator[int]:
    """Run parallel loops of numba in here; yields into how many chunks to cut their work."""
    with _one_at_a_time:
        number = min(torch.get_num_threads(), _MOST)
        if getattr(_local, "threads", None) != number:  # numba remembers it for each thread
            before = torch.get_num_threads()
            numba.set_num_threads(number)
            torch.set_num_threads(before)  # numba's first call sets OpenMP's number for torch, too
            _local.threads = number
        yield _CHUNKS_A_THREAD * number
