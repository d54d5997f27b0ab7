"""Configuration in YAML or JSON files, as plain data."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """YAML where 1e-3 is a number, as everywhere but in YAML 1.1."""


class _Dumper(yaml.SafeDumper):
    """Puts names into quotes that `_Loader` would read as numbers."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )


def read_text(path: Path, what: str) -> str:
    """The text of a file.

    Raises:
        ValueError: it cannot be read; `what` says what was expected there.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read {what} {path}: {error.strerror or error}") from error


def parse_data(text: str, source: str) -> Any:
    """Plain data from YAML or JSON text; `source` names it in errors.

    Raises:
        ValueError: it is neither.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        try:
            return yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise ValueError(f"{source} is not valid YAML or JSON: {error}") from error


def dump_data(data: Any, path: Path) -> None:
    """Write YAML, or JSON when the name ends in .json."""
    path.write_text(to_json(data) if path.suffix == ".json" else to_yaml(data), encoding="utf-8")


def to_yaml(data: Any) -> str:
    """Plain data as YAML, in its order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False)


def to_json(data: Any) -> str:
    """Plain data as JSON."""
    return json.dumps(data, indent=2) + "\n"
