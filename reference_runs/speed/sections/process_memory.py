"""What the system says of this process's memory (Linux)."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

from reference_runs.speed.peak import peak

#: Blocks above 1 MiB go back to the system when they are freed, so that the peak is what was needed
#: at once and not what the allocator kept for later.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}


def resident() -> int:
    """Resident size now, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    lines = dict(line.split(":", 1) for line in status.splitlines())
    return 1024 * int(lines["VmRSS"].split()[0])


def reset_peak() -> int:
    """Begin a new peak; returns the resident size that it begins from.

    Compiling kernels takes more for a moment than small networks do, and would hide them.
    """
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return resident()


def risen(start: int) -> int:
    """How far the peak is above `start`, which `reset_peak` gave."""
    return peak() - start
