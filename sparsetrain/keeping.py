"""What is kept in files, so that work that was stopped can go on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write a file that appears whole or not at all; its folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def first_difference(folder: Path, settings: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """Keep the settings of what goes into a folder; or compare them with those it has.

    Returns:
        Name of the first setting that differs, its kept value and the one given; None if none does.
    """
    path, text = folder / "settings.json", json.dumps(settings, indent=1)
    if not path.exists():
        with whole_file(path) as partial:
            partial.write_text(text, encoding="utf-8")
    known, given = json.loads(path.read_text(encoding="utf-8")), json.loads(text)
    differing = (name for name in given if known.get(name) != given[name])
    name = next(differing, None)
    return None if name is None else (name, known.get(name), given[name])


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file with a JSON object a line; a line that was cut short is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Write one record, and wait until it is on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        # A line that was cut short must not swallow the next one.
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
