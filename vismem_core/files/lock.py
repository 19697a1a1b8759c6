"""One program at a time: what two would write into the same place is refused to the second."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from vismem_core.errors import VismemError


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Nobody else who asks for ``path`` gets it inside the context; a program that is killed gives it up.

    Raises:
        VismemError: another has it.
    """
    place = path.with_name(f".{path.name}.lock")
    try:
        lock = FileLock(place, timeout=0)
        lock.acquire()
    except Timeout as error:
        raise VismemError(f"{path}: another program is writing to it; wait for it, or choose another place") from error
    try:
        yield
    finally:
        lock.release()
        place.unlink(missing_ok=True)
