"""One answer as it is written: text that is ready to be sent, where it stops, and which memory was invoked where."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from vismem_core.answers.inference import Place
from vismem_core.memory.tokens import MemoryTokens

Decode = Callable[[Sequence[int]], str]
HALF = "\ufffd"
"""What a tokenizer writes for a part of a character."""


class Text:
    """The text of tokens, in pieces that together are the answer's text.

    Space at the answer's start and end is no part of it, and neither is what begins with a stop string. What may yet
    turn out to be either is held back, and so are parts of characters.

    Attributes:
        stopped: whether a stop string was met.
    """

    def __init__(self, decode: Decode, stop: Sequence[str] = ()) -> None:
        self.decode, self.stop, self.stopped = decode, stop, False
        self._ids: list[int] = []
        self._start = self._seen = 0  # what is decoded begins at an earlier token: some write no space in front
        self._whole, self._sent = "", 0

    def add(self, token: int) -> None:
        """A token more."""
        self._ids.append(token)
        before = self.decode(self._ids[self._start : self._seen])
        now = self.decode(self._ids[self._start :])
        if now.endswith(HALF) or len(now) <= len(before):
            return
        self._start, self._seen = self._seen, len(self._ids)
        self._grow(now[len(before) :])

    def ready(self, last: bool = False) -> str:
        """What can be sent, and was not.

        Args:
            last: nothing comes after it.
        """
        if last and not self.stopped:
            told = self.decode(self._ids)
            self._grow(told[len(self._whole) :] if told.startswith(self._whole) else "")
        whole = self._whole if last or self.stopped else self._whole[: len(self._whole) - self._held()]
        first, end = self._sent or len(whole) - len(whole.lstrip()), len(whole.rstrip())
        self._sent = max(self._sent, end)
        return whole[first:end]

    def _grow(self, piece: str) -> None:
        first = max(0, len(self._whole) - max(map(len, self.stop), default=0) + 1)
        self._whole += piece
        met = [at for own in self.stop if (at := self._whole.find(own, first)) >= 0]
        if met:
            self._whole, self.stopped = self._whole[: min(met)], True

    def _held(self) -> int:
        """Characters at the end that may be a stop string's beginning."""
        longest = min(len(self._whole), max((len(own) - 1 for own in self.stop), default=0))
        ends = (
            count for count in range(longest, 0, -1) if any(own[:count] == self._whole[-count:] for own in self.stop)
        )
        return next(ends, 0)


@dataclass(frozen=True)
class Piece:
    """Some text of the answer with that number."""

    index: int
    text: str


@dataclass(frozen=True)
class End:
    """An answer is over.

    Attributes:
        why: ``stop``, or ``length`` where it had no room or no time left.
        tokens: that were written, memory tokens included.
        late: whether it had no time left.
    """

    index: int
    why: Literal["stop", "length"]
    tokens: int
    invocations: tuple[Place, ...]
    late: bool = False


class Answer:
    """A row of a batch.

    Args:
        index: of the answer among those to its request.
        tokens: the memory's.
        ends: ids that end an answer.
        until: when it has to be over, by ``time.monotonic``.
        tell: gets its pieces and its end.
        streams: whether pieces are wanted before the end.

    Attributes:
        most: tokens that it may have.
        written: tokens that it has, memory tokens included.
        end: set when it is over.
    """

    def __init__(
        self,
        index: int,
        text: Text,
        tokens: MemoryTokens,
        ends: frozenset[int],
        most: int,
        until: float,
        tell: Callable[[Piece | End], None],
        streams: bool = True,
    ) -> None:
        self.index, self.text, self.tokens, self.ends = index, text, tokens, ends
        self.most, self.until, self.tell, self.streams = most, until, tell, streams
        self.written, self.end = 0, None if most else End(index, "length", 0, ())
        self.places: list[Place] = []

    @property
    def left(self) -> int:
        """Tokens that it may still have."""
        return self.most - self.written

    def take(self, token: int) -> bool:
        """The next token; whether the answer is over. What comes after that is filler."""
        if self.end is not None:
            return True
        if (kind := self.tokens.kind(token)) is not None:
            self.places.append(Place(kind, self.written))
        self.written += 1
        if token < self.tokens.first:
            self.text.add(token)
        late = time.monotonic() > self.until
        over = token in self.ends or self.text.stopped
        if over or late or not self.left:
            why: Literal["stop", "length"] = "stop" if over else "length"
            self.end = End(self.index, why, self.written, tuple(self.places), late and not over)
        if (self.streams or self.end is not None) and (piece := self.text.ready(last=self.end is not None)):
            self.tell(Piece(self.index, piece))
        if self.end is not None:
            self.tell(self.end)
        return self.end is not None
