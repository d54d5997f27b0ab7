"""Every cell of the table of loops is backed by a test that exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "loops" / "index.md").read_text(encoding="utf-8")
GRID, REFERENCES = PAGE.split("| cell | what is compared | test |")


def test_every_cell_has_its_test() -> None:
    rows = [line for line in GRID.splitlines() if line.startswith("| ") and "[" in line]
    cells = [cell for row in rows for cell in row.strip("|").split("|")[1:]]
    assert len(rows) == 6 and len(cells) == 30
    numbered = [re.findall(r"\[(\d+)\]", cell) for cell in cells]
    assert [number for numbers in numbered for number in numbers] == [
        str(number) for number in range(1, 31)
    ]
    named: set[str] = set()
    for line in REFERENCES.splitlines():
        if re.match(r"\| \d", line):
            _, numbers, _, tests, _ = line.split("|")
            assert "::" in tests
            named.update(numbers.replace(" ", "").split(","))
    assert named == {str(number) for number in range(1, 31)}


def test_every_test_that_is_named_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", REFERENCES)
    assert len(named) >= 30
    for file, function in named:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert function in functions, f"{file}::{function}"
