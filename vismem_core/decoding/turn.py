"""Whose turn it is: calls with memory, of all models, one after the other.

While memory is formed, hooks listen to the model and attention functions of transformers are exchanged; what another
thread did with a model meanwhile would be heard too. So a call holds the turn, and so does every pass of a model with
memory outside of one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turn:
    """A lock that a thread may take again, and that passes which were torn down give back late but do give back."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._mine = threading.local()

    @contextmanager
    def call(self) -> Iterator[None]:
        """This thread's turn; whatever ends the call, nothing of it stays taken."""
        self._lock.acquire()
        before, self._mine.passes = self._passes, 0
        self._mine.calls = self._calls + 1
        try:
            yield
        finally:
            self._drop()
            self._mine.passes, self._mine.calls = before, self._mine.calls - 1
            self._lock.release()

    def enter(self) -> None:
        """A pass begins."""
        if not self._calls:
            self._drop()  # torch tells of passes that end in an exception, not of those that Ctrl-C ends
        self._lock.acquire()
        self._mine.passes = self._passes + 1

    def leave(self) -> None:
        """A pass is over."""
        if self._passes:
            self._mine.passes -= 1
            self._lock.release()

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Between two passes of a call: others may have the turn inside the context."""
        self._lock.release()
        try:
            yield
        finally:
            self._lock.acquire()

    @property
    def taken(self) -> bool:
        """Whether this thread is inside a call."""
        return self._calls > 0

    @property
    def _passes(self) -> int:
        return int(getattr(self._mine, "passes", 0))

    @property
    def _calls(self) -> int:
        return int(getattr(self._mine, "calls", 0))

    def _drop(self) -> None:
        while self._passes:
            self.leave()


TURN = Turn()
