"""The commands of the command line, one group a module."""

from __future__ import annotations

from typing import Annotated

import typer

from sparsetrain.commands import files, training

app = typer.Typer(
    name="sparsetrain",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        import sparsetrain

        typer.echo(sparsetrain.__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and stop."
        ),
    ] = False,
) -> None:
    """Train sparse networks, and look at what was trained.

    Begin with `sparsetrain demo`; it takes less than a minute.
    """


app.command()(training.demo)
app.command()(training.train)
app.command()(files.validate)
app.command()(files.inspect)
app.command()(files.report)

__all__ = ["app"]
