"""The ``vismem`` program: a module per command, and errors as one line on stderr.

Exit codes: 0 done, 1 an error that is said in one line, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # Ctrl-C is caught from here on, and importing typing takes long enough to press it
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

__all__ = ["main"]


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run ``vismem`` with ``args``, by default those of the process; always ends in SystemExit."""
    try:
        from .program import run

        run(list(sys.argv[1:] if args is None else args))
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)  # noqa: T201
        sys.exit(130)
