"""The command line `wavedistill`. It answers for itself before it imports what computes."""

import sys

import typer

from wavedistill.cli.commands import app
from wavedistill.tools.errors import RecipeError, UserError


def main() -> None:
    """Entry point: a user's mistake ends in one clear message, 2 for usage and recipes, 1 for everything else."""
    from wavedistill.tools.memory import keep_freed_memory

    keep_freed_memory()
    try:
        app()
    except SystemExit as ended:
        if not ended.code and "torch" in sys.modules:
            from wavedistill.tools.engine import leave

            leave()
        raise
    except RecipeError as error:
        sys.exit(_fail(error, 2))
    except (UserError, OSError) as error:  # a disk that is full or not ours to write is no fault of the program
        sys.exit(_fail(error, 1))


def _fail(error: Exception, code: int) -> int:
    typer.echo(f"wavedistill: {error}", err=True)
    return code
