"""Ctrl-C, SIGTERM (Slurm, docker stop) and SIGHUP let a run end its step and save it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .processes import Processes

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
GRACE = 5.0
"""Seconds that a step gets to end after a signal: docker kills after ten."""


class Interrupt:
    """Inside the context a signal is noted, so that the step can end.

    Attributes:
        came: the number of the first that came, 0 before.

    A second signal does not wait, and neither does a step that takes longer than :data:`GRACE`: they raise
    KeyboardInterrupt, outside of :meth:`held`. Where the main thread is not this one, signals are left alone.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes, self.came, self._held, self._late = processes, 0, False, False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            known = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
            self._before = {number: signal.signal(number, self._note) for number in known}
            if hasattr(signal, "SIGALRM"):
                self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self.came and hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self) -> bool:
        """Whether one came to any process; all have to ask."""
        if agreed := self.processes.anyone(bool(self.came)):
            self.came = self.came or signal.SIGTERM  # as whoever ends all processes sends
        return agreed

    @contextmanager
    def held(self) -> Iterator[None]:
        """What is inside is done as a whole."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._late:
            raise KeyboardInterrupt

    def _note(self, number: int, _: object) -> None:
        first, self.came = not self.came, self.came or number
        if first and hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, GRACE)
        if not first:
            self._late = True
            if not self._held:
                raise KeyboardInterrupt
