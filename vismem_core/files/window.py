"""A file of JSON values one after another, of which no more is held than a piece and the value that stands there."""

from __future__ import annotations

import codecs
import json
import re
from typing import Any, BinaryIO

LONGEST = 2**26
"""Bytes of a row."""
PIECE = 2**20
"""Bytes that are read together."""
BETWEEN = re.compile(r"[ \t\r\n,]*")
"""What may stand between the elements of a JSON array."""


class Window:
    """Some of a file's text, a character for each byte: what JSON is made of is the same, and a place in it is one in
    the file.

    Attributes:
        start: the byte at which the text begins.
        at: how much of it was read.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.text, self.start, self.at = file, "", 0, 0
        self._utf8, self._decoder = codecs.getincrementaldecoder("utf-8")(), json.JSONDecoder()
        self._more()

    @property
    def ended(self) -> bool:
        """Whether nothing is left of the file."""
        return self.at >= len(self.text) and not self._more()

    def skip(self, count: int) -> int:
        """Go on by so many characters; the lines that end among them."""
        self.at += count
        return self.text.count("\n", self.at - count, self.at)

    def skip_between(self) -> int:
        """Go on to where a value begins; the lines that end before it."""
        lines = 0
        while not self.ended:
            rest = BETWEEN.match(self.text, self.at).end()  # type: ignore[union-attr]
            lines += self.skip(rest - self.at)
            if self.at < len(self.text):
                break
        return lines

    def value(self) -> tuple[Any, str]:
        """The value that stands here, and its text.

        Raises:
            ValueError, RecursionError: it is no JSON.
        """
        while True:
            try:
                value, end = self._decoder.raw_decode(self.text, self.at)
                return value, self.text[self.at : end]
            except ValueError:  # perhaps it goes on
                if len(self.text) - self.at > LONGEST or not self._more():
                    raise

    def why(self, error: Exception) -> str:
        """What is wrong with the value that stands here."""
        if len(self.text) - self.at > LONGEST:
            return f"is longer than {LONGEST:,} bytes, or does not end"
        if not isinstance(error, json.JSONDecodeError):
            return f"not JSON: {error}"
        return f"not JSON: {error.msg.removesuffix(' at')} at byte {self.start + error.pos}"

    def _more(self) -> bool:
        """Take in as much again as was not read, and give up what was; whether there was more."""
        rest = len(self.text) - self.at
        data = self.file.read(max(PIECE, rest))
        self._utf8.decode(data, final=not data)
        if data:
            self.start, self.at, self.text = self.start + self.at, 0, self.text[self.at :] + data.decode("latin-1")
        return bool(data)
