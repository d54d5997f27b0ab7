"""What the commands share: where they print, and how they say that something is wrong."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec

import typer
from pydantic import ValidationError
from rich.console import Console

P = ParamSpec("P")


def out() -> Console:
    """The console for results."""
    return Console()


def says_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Turn the library's ValueErrors and missing packages into a line on stderr and exit code 1."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except ModuleNotFoundError as error:
            _fail(f"{error.name} is not installed: pip install 'sparsetrain[demo]'")
        except (ValueError, OSError) as error:
            _fail(_readable(error))

    return wrapped


def _readable(error: Exception) -> str:
    """The error's text, with a line for each field where pydantic writes three."""
    for part in (error, error.__cause__):
        if isinstance(part, ValidationError):
            lines = "".join(f"\n  {_field(detail)}" for detail in part.errors())
            return str(error).replace(str(part), lines).replace(": \n", ":\n").strip()
    return str(error)


def _field(detail: Mapping[str, Any]) -> str:
    place = ".".join(map(str, detail["loc"])) or "recipe"
    message = detail["msg"].removeprefix("Value error, ")
    given = detail["input"]
    shown = f" (it is {given!r})" if isinstance(given, str | int | float) else ""
    return f"{place}: {message}{shown}"


def _fail(message: str) -> None:
    console = Console(stderr=True)
    console.print("[bold red]error:[/bold red] ", end="")
    console.print(message, markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(1)
