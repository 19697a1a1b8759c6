"""The ``vismem`` program: a module per command, and errors as one line on stderr.

Exit codes: 0 done, 1 an error that is said in one line, 2 wrong usage, 128 + N by signal N.
"""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False  # Ctrl-C is caught from here on, and importing typing takes long enough to press it
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType
    from typing import NoReturn

__all__ = ["main"]

INTERRUPTED = "error: interrupted"


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run ``vismem`` with ``args``, by default those of the process; always ends in SystemExit."""
    try:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _interrupted)
        from .program import run

        run(list(sys.argv[1:] if args is None else args))
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)  # noqa: T201
        sys.exit(130)


def _interrupted(number: int, frame: FrameType | None) -> None:
    """Ctrl-C. Libraries that are being imported turn it into errors of their own or go on: there we end at once."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            print(INTERRUPTED, file=sys.stderr, flush=True)  # noqa: T201
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt
