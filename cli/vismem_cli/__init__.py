"""The ``vismem`` program: a module per command, and errors as one line on stderr.

Exit codes: 0 done, 1 an error that is said in one line, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence
from typing import NoReturn

from vismem_core.errors import VismemError

from .app import app

__all__ = ["app", "main"]

ADVICE = {
    errno.ENOSPC: "; free some space and run the same command again (train: with --resume)",
    errno.EDQUOT: "; free some space and run the same command again (train: with --resume)",
    errno.EACCES: "; check the permissions, or choose another place",
    errno.EROFS: "; choose another place",
}


def main(args: Sequence[str] | None = None) -> None:
    """Run ``vismem`` with ``args``, by default those of the process; always ends in SystemExit."""
    try:
        app(args, prog_name="vismem")
    except VismemError as error:
        _fail(str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}{ADVICE.get(error.errno or 0, '')}")


def _fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)  # noqa: T201 - plain, whatever the terminal
    sys.exit(1)
