"""The `sparsetrain` command. What it does is in `sparsetrain.commands`."""

from __future__ import annotations

import sys
from importlib.util import find_spec


def main() -> None:
    """Run the command line; says what to install when the packages it needs are missing."""
    missing = [package for package in ("typer", "matplotlib") if find_spec(package) is None]
    if missing:
        sys.exit(f"the command line needs {' and '.join(missing)}: pip install 'sparsetrain[demo]'")
    from sparsetrain.commands import app

    app(prog_name="sparsetrain")


if __name__ == "__main__":
    main()
