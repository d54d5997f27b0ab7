"""Commands that look at files: validate, inspect and report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sparsetrain.commands.console import out, says_errors


@says_errors
def validate(
    recipe: Annotated[Path, typer.Argument(help="Recipe file, YAML or JSON.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the recipe as JSON instead of YAML.")
    ] = False,
) -> None:
    """Check a recipe, and print it with every default filled in.

    Exit code 1 and one line that says what is wrong when it is not a valid recipe.

    **Example**, for a file `rigl.yaml` with the line
    `policy: {kind: rigl, sparsity: 0.95, total_steps: 20000}`:

        sparsetrain validate rigl.yaml
    """
    from sparsetrain.recipe import Recipe

    checked = Recipe.load(recipe)
    typer.echo((checked.to_json() if as_json else checked.to_yaml()).rstrip())


@says_errors
def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="A torch checkpoint, or a .safetensors file.")],
    everything: Annotated[
        bool,
        typer.Option("--all", help="List biases, norms and optimizer state too."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show how sparse each weight in a checkpoint is.

    Reads state dicts nested to any depth, and runs no code from the file. Exit code 1 when the
    file cannot be read.

    **Example**:

        sparsetrain inspect my-run/model.pt
    """
    from sparsetrain.inspect import inspect_checkpoint

    found = inspect_checkpoint(checkpoint, everything=everything)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        out().print(found)


@says_errors
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a run made by `sparsetrain train`.")],
) -> None:
    """Draw the picture and write the HTML page of a training run again.

    Works while a run is going on and after it was interrupted, with what there is so far.

    **Example**:

        sparsetrain report my-run
    """
    from sparsetrain.report.run_page import write_run_page

    out().print(f"wrote {write_run_page(folder)}", soft_wrap=True, highlight=False)
