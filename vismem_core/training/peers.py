"""Signs of life between the processes of a run: whoever is gone is named, and nobody waits for it.

A process that waits in a collective operation for one that died or was stopped cannot be interrupted from Python. So a
thread of each looks after the others, through the store that they met by: the first after all, all after the first.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from vismem_core.errors import TrainingError
from vismem_core.plugins import reason

BEAT = 1.0
"""Seconds between two signs of life."""
SILENCE = 60.0
"""Seconds without one after which a process counts as gone."""
FAILED = 4.0
"""The same once a collective operation has failed, which says that somebody is."""
LEAVE = 20.0
"""Seconds that a process has to end by itself when it knows that the run is over."""
LEFT = "left"
"""Where the first that leaves says why."""


class Peers:
    """Inside the context a process that is gone ends all others, each with one line that names it.

    Args:
        rank: this process's number, of ``count``.
        save: saves the last whole step, and says which it is; called from another thread before the process is ended.
    """

    def __init__(self, rank: int, count: int, save: Callable[[], str | None]) -> None:
        self.rank, self.save, self.silence = rank, save, SILENCE
        self.others = [peer for peer in (range(count) if rank == 0 else [0]) if peer != rank]
        self.why: str | None = None
        self._known, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peers:
        if self.others:
            # A connection of its own: the other may be taken by somebody who waits.
            self._store = PrefixStore("vismem", _get_default_store().clone())
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if not self.others:
            return
        with _no_sigterm():  # torchrun sends it as soon as one process is gone, before it could be named
            if isinstance(error, RuntimeError):
                self.silence = FAILED
                self._known.wait(2 * FAILED + 2 * BEAT)
            elif error is not None and not self._known.is_set():
                self._tell(f"process {self.rank} ended: {reason(error)}")
            self._over.set()
            self._thread.join(LEAVE)
        if isinstance(error, RuntimeError) and self.why is not None:
            raise TrainingError(self.why) from error
        if isinstance(error, RuntimeError):
            self._tell(f"process {self.rank} ended: {reason(error)}")

    def _tell(self, why: str) -> None:
        try:
            if not self._store.check([LEFT]):
                self._store.set(LEFT, why)
                time.sleep(3 * BEAT)  # the store may go with this process, and the others have to hear
        except RuntimeError:  # the store is gone, and all that looked there know
            pass

    def _watch(self) -> None:
        heard = dict.fromkeys(self.others, (0, time.monotonic()))
        while self.why is None and not self._over.wait(BEAT):
            try:
                self._store.add(str(self.rank), 1)
                if self._store.check([LEFT]):
                    self.why = self._store.get(LEFT).decode()
                elif (peer := self._silent(heard)) is not None:
                    self.why = (
                        f"process {peer} gives no sign of life: it died, was stopped, or its machine cannot be reached"
                    )
                    self._store.set(LEFT, self.why)
            except RuntimeError:
                self.why = "process 0 cannot be reached any more: it ended, or its machine did"
        if self.why is not None:
            self._known.set()
            if not self._over.wait(LEAVE):
                self._end(self.why)

    def _silent(self, heard: dict[int, tuple[int, float]]) -> int | None:
        """The first process that has not been heard of for too long."""
        for peer, (beats, at) in heard.items():
            if (now := self._store.add(str(peer), 0)) != beats:
                heard[peer] = (now, time.monotonic())
            elif time.monotonic() - at > self.silence:
                return peer
        return None

    def _end(self, why: str) -> None:
        """The main thread waits for who is gone, and will not return."""
        where = None
        try:
            where = self.save()
        finally:
            saved = f"; saved after {where}, --resume goes on from there" if where else ""
            print(f"error: {why}{saved}", file=sys.stderr, flush=True)  # noqa: T201 - as the program does
            os._exit(1)


@contextmanager
def _no_sigterm() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
