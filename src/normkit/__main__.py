"""The command `normkit`, and `python -m normkit`."""

from __future__ import annotations

import io
import sys


def main() -> None:
    """Runs the command line; without the packages it is written with, says how to get them."""
    try:
        from normkit.cli import app
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("typer", "rich"):
            raise
        sys.exit(f"normkit: the command line needs {package}: pip install 'normkit[cli]'")
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of layers may hold any letters
        sys.stdout.reconfigure(errors="backslashreplace")
    app(prog_name="normkit")


if __name__ == "__main__":
    main()
