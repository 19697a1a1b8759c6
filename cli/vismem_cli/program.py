"""Running a command: what goes wrong becomes one line on stderr and an exit code."""

from __future__ import annotations

import errno
import logging
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from types import FrameType
from typing import Any, NoReturn, cast

import typer
import typer.main

from vismem_core.errors import RunInterruptedError, VismemError

from .app import app
from .console import warn

USAGE = cast(type[Exception], typer.BadParameter.__mro__[1])
"""UsageError, of click or of the copy that newer typers bring along."""
INTERRUPTED = 130
ADVICE = {
    errno.ENOSPC: "; free some space and run the same command again (train: with --resume)",
    errno.EDQUOT: "; free some space and run the same command again (train: with --resume)",
    errno.EACCES: "; check the permissions, or choose another place",
    errno.EROFS: "; choose another place",
}


def run(args: Sequence[str]) -> NoReturn:
    """Run ``vismem`` with ``args``; always ends in SystemExit."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels when peft looks for it
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # what a terminal cannot show must not cost the answer
    came: list[int] = []
    try:
        with warnings.catch_warnings(), _noted(came):
            warnings.showwarning = _shown
            code = typer.main.get_command(app).main(list(args) or ["--help"], prog_name="vismem", standalone_mode=False)
        if code == INTERRUPTED or came:  # as newer typers tell of Ctrl-C
            _fail("interrupted", INTERRUPTED)
        sys.exit(code if isinstance(code, int) else 0)
    except USAGE as error:
        _fail(_usage(error), 2)
    except typer.Abort:
        _fail("interrupted", INTERRUPTED)
    except RunInterruptedError as error:
        _fail(str(error), 128 + error.signal)  # as a shell tells of a process that a signal ended
    except VismemError as error:
        _fail(str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}{ADVICE.get(error.errno or 0, '')}")


@contextmanager
def _noted(came: list[int]) -> Iterator[None]:
    """Note that Ctrl-C came: while libraries are imported, some take any exception for a part that is missing."""

    def interrupted(number: int, frame: FrameType | None) -> None:
        came.append(number)
        signal.default_int_handler(number, frame)

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


USUAL = warnings.showwarning


def _shown(message: Warning | str, category: type[Warning], *rest: Any, **named: Any) -> None:
    """Warnings to the user are one line; those to developers are left as they are."""
    if issubclass(category, UserWarning):
        warn(" ".join(str(message).split()))
    else:
        USUAL(message, category, *rest, **named)


def _usage(error: Any) -> str:
    command = error.ctx.command_path if error.ctx else "vismem"
    told = error.format_message().rstrip(".").replace("Value error, ", "")  # pydantic's, with which newer typers read
    return f"{told}; see {command} --help"


def _fail(message: str, code: int = 1) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)  # noqa: T201 - plain, whatever the terminal
    sys.exit(code)
