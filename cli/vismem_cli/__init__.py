"""The ``vismem`` program: a module per command, and errors as one line on stderr.

Exit codes: 0 done, 1 an error that is said in one line, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence
from typing import Any, NoReturn, cast

import typer
import typer.main

from vismem_core.errors import VismemError

from .app import app

__all__ = ["app", "main"]

USAGE = cast(type[Exception], typer.BadParameter.__mro__[1])
"""UsageError, of click or of the copy that newer typers bring along."""
ADVICE = {
    errno.ENOSPC: "; free some space and run the same command again (train: with --resume)",
    errno.EDQUOT: "; free some space and run the same command again (train: with --resume)",
    errno.EACCES: "; check the permissions, or choose another place",
    errno.EROFS: "; choose another place",
}


def main(args: Sequence[str] | None = None) -> None:
    """Run ``vismem`` with ``args``, by default those of the process; always ends in SystemExit."""
    args = list(sys.argv[1:] if args is None else args) or ["--help"]
    try:
        code = typer.main.get_command(app).main(args, prog_name="vismem", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except USAGE as error:
        _fail(_usage(error), 2)
    except typer.Abort:
        _fail("interrupted", 130)
    except VismemError as error:
        _fail(str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}{ADVICE.get(error.errno or 0, '')}")


def _usage(error: Any) -> str:
    command = error.ctx.command_path if error.ctx else "vismem"
    return f"{error.format_message().rstrip('.')}; see {command} --help"


def _fail(message: str, code: int = 1) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)  # noqa: T201 - plain, whatever the terminal
    sys.exit(code)
