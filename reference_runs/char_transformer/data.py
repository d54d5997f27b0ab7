"""The sources of Python's standard library as characters, divided by file.

Nothing is downloaded: the text is what the running Python was installed with, so another version
of Python has another text. `Text.digest` tells them apart.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

#: Folders that are left out: tests, other people's packages, tables, and an editor.
LEFT_OUT = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "idlelib",
    "encodings",
    "pydoc_data",
}
#: Files that differ from one build of Python to the next.
OF_THE_BUILD = "_sysconfigdata"
KNOWN = 100  # characters with a number of their own; all others share one more
VALIDATION_SHARE = 10  # one file in so many is for validation
LONGEST = 100_000  # characters of a validation file, so that none is a large part of that text


@dataclass(frozen=True)
class Text:
    """Both parts as character numbers, int64 [characters].

    Attributes:
        vocabulary: the characters by number; what is not among them has the number after the last.
        files: how many, of training and of validation.
        digest: tells one version of the text from another.
    """

    train: Tensor
    validation: Tensor
    vocabulary: str
    files: tuple[int, int]
    digest: str

    @property
    def characters(self) -> int:
        """How many numbers there are."""
        return len(self.vocabulary) + 1


def sources() -> Iterator[tuple[str, str]]:
    """Name and text of each file, sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    named = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    for name in sorted(named):
        parts = name.split("/")
        if not LEFT_OUT.intersection(parts[:-1]) and not parts[-1].startswith(OF_THE_BUILD):
            yield name, named[name].read_text(encoding="utf-8", errors="replace")


def is_validation(name: str, text: str) -> bool:
    """Whether a file is for validation: its name decides, and files that are too long never are."""
    chosen = int.from_bytes(_hash(name)[:8], "big") % VALIDATION_SHARE == 0
    return chosen and len(text) <= LONGEST


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


@cache
def load() -> Text:
    """Read and number everything; takes a second."""
    train: list[str] = []
    validation: list[str] = []
    for name, text in sources():
        (validation if is_validation(name, text) else train).append(text)
    learned, held_out = "\n".join(train), "\n".join(validation)
    counts = Counter(learned)
    # By count, then by character, so that ties are the same everywhere.
    vocabulary = "".join(sorted(counts, key=lambda c: (-counts[c], c))[:KNOWN])
    return Text(
        numbers(learned, vocabulary),
        numbers(held_out, vocabulary),
        vocabulary,
        (len(train), len(validation)),
        _hash(f"{learned}\0{held_out}").hex()[:16],
    )


def numbers(text: str, vocabulary: str) -> Tensor:
    """Character numbers, int64 [characters]; what is not in the vocabulary gets its length."""
    table = np.full(0x110000, len(vocabulary), dtype=np.int64)
    table[[ord(character) for character in vocabulary]] = range(len(vocabulary))
    return torch.from_numpy(table[np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)])


def cut(text: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Windows at these places and the next character of each position: [windows, context] both."""
    windows = text[starts.unsqueeze(1) + torch.arange(context + 1)]
    return windows[:, :-1], windows[:, 1:]


def drawn(text: Tensor, count: int, context: int, generator: torch.Generator) -> Tensor:
    """Places of random windows."""
    return torch.randint(len(text) - context, (count,), generator=generator)


def spaced(text: Tensor, count: int, context: int) -> Tensor:
    """Places of windows that lie evenly over the whole text and share no prediction.

    Raises:
        ValueError: the text is too short for so many.
    """
    distance = (len(text) - 1) // count
    if distance < context:
        raise ValueError(f"{len(text)} characters have no {count} windows of {context}")
    return torch.arange(count) * distance
