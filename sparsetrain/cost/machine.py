"""The machine that something was measured on."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, fields
from pathlib import Path

import torch


@dataclass(frozen=True)
class Machine:
    """What a measured time depends on beside the network.

    Attributes:
        processor: its name.
        logical_cores: as the system counts them.
        threads: of torch.
        torch_version: of torch.
        device: "cpu", or the name of the GPU.
    """

    processor: str
    logical_cores: int
    threads: int
    torch_version: str
    device: str

    @classmethod
    def here(cls, device: torch.device) -> Machine:
        """This machine, as it is now."""
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        cores, threads = os.cpu_count() or 1, torch.get_num_threads()
        return cls(processor_name(), cores, threads, str(torch.__version__), name)

    def differences(self, other: Machine) -> str:
        """What differs, in words; empty if nothing does."""
        pairs = [(f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self)]
        return ", ".join(
            f"{name.replace('_', ' ')} {mine}, not {theirs}"
            for name, mine, theirs in pairs
            if mine != theirs
        )


def processor_name() -> str:
    """Name of the processor as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")
