"""What a result depends on beside its recipe and seed."""

from __future__ import annotations

import platform
from importlib import metadata

import torch


def environment() -> dict[str, str]:
    """Versions, processor architecture and number of threads, for the record of a run."""
    return {
        "sparsetrain": _version("sparsetrain"),
        "torch": torch.__version__,
        "numpy": _version("numpy"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": str(torch.get_num_threads()),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed as a package"
