"""Tables as plain text."""

from __future__ import annotations

from typing import Any

from rich.console import Console


def as_text(renderable: Any) -> str:
    """What rich shows, 100 letters wide and without colours."""
    console = Console(width=100, force_terminal=False, no_color=True)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()
