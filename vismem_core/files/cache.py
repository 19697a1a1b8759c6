"""The user's cache folder: ``VISMEM_CACHE``, or else ``vismem`` in ``XDG_CACHE_HOME`` or ``~/.cache``."""

from __future__ import annotations

import os
import threading
from pathlib import Path


def folder(name: str) -> Path:
    """The part of the cache that holds one kind of thing; it may not be there yet."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("VISMEM_CACHE") or Path(home) / "vismem") / name


def keep(place: Path, data: bytes) -> None:
    """Put a file into the cache, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    waiting = place.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
    waiting.write_bytes(data)
    os.replace(waiting, place)
