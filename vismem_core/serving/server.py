"""The server's life: a socket, the application on it, and an end that lets everybody finish."""

from __future__ import annotations

import importlib
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

from vismem_core.errors import VismemError

from .refused import Limits

if TYPE_CHECKING:
    import uvicorn

    from vismem_core.memory.memory import Memory

EXTRA = 'pip install "vismem[serve]"'
LONGER = 10
"""Seconds that connections may take to end after the time of a request."""


def check() -> None:
    """Whether what serving takes is installed.

    Raises:
        VismemError: it is not.
    """
    for name in ("fastapi", "uvicorn"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise VismemError(f"serving takes the package {name}: {EXTRA}") from error


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 is any that is free.

    Raises:
        VismemError: it cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        told = getattr(error, "strerror", None) or error
        raise VismemError(f"{host}:{port}: {told}; choose another --host or --port") from error


def build(
    memory: Memory,
    name: str,
    limits: Limits,
    *,
    batch: int = 32,
    key: str | None = None,
    urls: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> uvicorn.Server:
    """A server that is yet to be run (:func:`run`, or its own ``run`` in a thread).

    Args:
        name: of the model, for clients.
        batch: answers written together.
        key: that clients must send.
        urls: whether images may be fetched.
        report: gets a line about what failed.
    """
    check()
    import uvicorn

    from .app import application
    from .batcher import Batcher
    from .exchange import Service

    batcher = Batcher(memory, limits, batch=batch, report=report)
    app = application(Service(name, batcher, limits, key, urls, report))
    config = uvicorn.Config(
        app,
        log_level="critical",  # what fails is reported in a line
        access_log=False,
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=int(limits.seconds) + LONGER,
    )
    return uvicorn.Server(config)


def run(server: uvicorn.Server, listening: socket.socket) -> None:
    """Serve until SIGTERM or Ctrl-C comes, and finish what runs then.

    Raises:
        KeyboardInterrupt: it was Ctrl-C, after all is finished.
    """
    signal.signal(signal.SIGTERM, _finished)
    server.run(sockets=[listening])


def _finished(number: int, frame: FrameType | None) -> None:
    """uvicorn raises the signal that ended it once more, when all is done."""
