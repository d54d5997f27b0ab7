"""One self-contained HTML page: tables, pictures and what was run, with no outside files."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #222;
       background: #fff; max-width: 62rem; margin: 3rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; }
p { margin: .4rem 0 .8rem; max-width: 46rem; }
p.lead { font-size: 1.05rem; color: #444; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .9rem; text-align: right; border-bottom: 1px solid #e4e4e4;
         white-space: nowrap; }
th { font-weight: 600; border-bottom: 2px solid #999; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
img { width: 100%; height: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; margin: 0; }
dt { color: #666; }
dd { margin: 0; overflow-wrap: anywhere; }
pre { background: #f6f6f6; padding: .8rem 1rem; overflow-x: auto; font-size: .85rem; }
"""


@dataclass(frozen=True)
class Table:
    """Column heads and rows of text."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def render(self) -> str:
        """The table as HTML."""
        head = "".join(f"<th>{html.escape(column)}</th>" for column in self.columns)
        body = "\n".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self.rows
        )
        return (
            f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n'
            f"<tbody>\n{body}\n</tbody></table></div>"
        )


@dataclass(frozen=True)
class Picture:
    """A PNG picture, put into the page itself, and the text for those who cannot see it."""

    png: bytes
    description: str

    def render(self) -> str:
        """The picture as HTML."""
        data = base64.b64encode(self.png).decode("ascii")
        return f'<img alt="{html.escape(self.description)}" src="data:image/png;base64,{data}">'


@dataclass(frozen=True)
class Facts:
    """Names and values, such as versions, seeds and times."""

    values: Mapping[str, str]

    def render(self) -> str:
        """The list as HTML."""
        items = "\n".join(
            f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>"
            for name, value in self.values.items()
        )
        return f"<dl>\n{items}\n</dl>"


@dataclass(frozen=True)
class Code:
    """Text that keeps its line breaks, such as a recipe."""

    text: str

    def render(self) -> str:
        """The text as HTML."""
        return f"<pre>{html.escape(self.text)}</pre>"


@dataclass(frozen=True)
class Section:
    """A heading, a paragraph and what it talks about."""

    heading: str
    content: Table | Picture | Facts | Code
    text: str = ""

    def render(self) -> str:
        """The section as HTML."""
        text = f"<p>{html.escape(self.text)}</p>\n" if self.text else ""
        return f"<h2>{html.escape(self.heading)}</h2>\n{text}{self.content.render()}"


@dataclass(frozen=True)
class Page:
    """A whole page: title, a lead that says what was found, and sections."""

    title: str
    lead: str
    sections: Sequence[Section] = field(default_factory=tuple)

    def render(self) -> str:
        """The page as HTML."""
        sections = "\n".join(section.render() for section in self.sections)
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{html.escape(self.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
            f"<h1>{html.escape(self.title)}</h1>\n"
            f'<p class="lead">{html.escape(self.lead)}</p>\n{sections}\n</body>\n</html>\n'
        )

    def write(self, path: str | Path) -> Path:
        """Write the page to a file and return the path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.render(), encoding="utf-8")
        return path
