"""The command line: thin words over `cltrain.api`. Heavy packages are imported inside the command that needs them.

Exit codes: 0 done, 1 failed, 2 configuration, 3 data, 4 conflict, 5 server; the gate's verdicts: 10 hold, 11 reject,
12 error. An audit ends with 0, 11 (alarm) or 12 (not measured).
"""

from __future__ import annotations

import errno
import json
import sys
from typing import Annotated, NoReturn

import typer

from cltrain import __version__
from cltrain.cli.parts import app, warn
from cltrain.errors import CltrainError, DataError

# isort: split
from cltrain.cli import serving, learning, deciding, looking, keys  # noqa: F401, I001  # in the order of --help


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"cltrain {__version__}")
        raise typer.Exit


@app.callback()
def about_all(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """What comes before the command."""


def main() -> None:
    """Entry point: what a user can fix is printed without a traceback, with an exit code that scripts can use."""
    try:
        app()
    except CltrainError as error:
        _fail(error)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        _fail(DataError(f"{error.strerror}: {error.filename or 'a file'} could not be written; free some space"))


def _fail(error: CltrainError) -> NoReturn:
    if "--json" in sys.argv:
        typer.echo(json.dumps({"error": type(error).__name__, "message": str(error)}))
    warn(f"{type(error).__name__}: {error}")
    sys.exit(error.exit_code)
