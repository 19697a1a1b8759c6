"""Batches that take turns on one model, step by step, so that a long answer keeps nobody waiting."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class Baton:
    """Who has it may use the model; it goes to whoever has waited longest."""

    def __init__(self) -> None:
        self._mutex, self._held = threading.Lock(), False
        self._waiting: deque[threading.Lock] = deque()

    def __enter__(self) -> None:
        with self._mutex:
            if not self._held:
                self._held = True
                return
            mine = threading.Lock()
            mine.acquire()
            self._waiting.append(mine)
        mine.acquire()  # released by who hands it over

    def __exit__(self, *error: object) -> None:
        with self._mutex:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._held = False

    @property
    def wanted(self) -> bool:
        """Whether somebody waits for it."""
        return bool(self._waiting)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Others may have it inside the context, which ends when it comes back."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()
