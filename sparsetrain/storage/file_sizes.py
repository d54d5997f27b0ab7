"""What a sparse model takes on disk, and what it would take as dense tensors."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from sparsetrain.report.text import as_text
from sparsetrain.storage.container import Contents, read, to_bytes
from sparsetrain.storage.files import as_dense, contents_of

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Sizes:
    """Bytes of one model in four forms.

    Attributes:
        dense: a safetensors file of dense tensors, in the model's own dtypes.
        dense_gzip: the same through gzip.
        compact: the file that `save` writes.
        compact_gzip: the same through gzip.
    """

    dense: int
    dense_gzip: int
    compact: int
    compact_gzip: int

    @property
    def ratio(self) -> float:
        """How many times the dense file is as large as the compact one."""
        return self.dense / self.compact

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "dense": self.dense,
            "dense_gzip": self.dense_gzip,
            "compact": self.compact,
            "compact_gzip": self.compact_gzip,
            "ratio": self.ratio,
        }

    def __rich__(self) -> Table:
        from rich.table import Table

        title = f"{self.ratio:.1f} times smaller than dense"
        table = Table(title=title, title_justify="left")
        table.add_column("file")
        for heading in ("bytes", "of dense"):
            table.add_column(heading, justify="right")
        for name, size in (
            ("dense", self.dense),
            ("dense, gzip", self.dense_gzip),
            ("compact", self.compact),
            ("compact, gzip", self.compact_gzip),
        ):
            table.add_row(name, f"{size:,}", f"{size / self.dense:.1%}")
        return table

    def __str__(self) -> str:
        return as_text(self)


def sizes(source: nn.Module | str | Path) -> Sizes:
    """Measure a model, or a file that `save` wrote, by making every form in memory.

    Raises:
        ValueError: as `save` and `load`.
    """
    contents = contents_of(source) if isinstance(source, nn.Module) else read(Path(source))
    compact = to_bytes(contents)
    dense = _dense_file(contents)
    return Sizes(len(dense), _gzipped(dense), len(compact), _gzipped(compact))


def _dense_file(contents: Contents) -> bytes:
    # As safetensors.torch.save_model does: tied tensors once.
    from safetensors.torch import save

    return save({name: as_dense(held) for name, held in contents.tensors.items()})


def _gzipped(data: bytes) -> int:
    return len(gzip.compress(data, compresslevel=6, mtime=0))
