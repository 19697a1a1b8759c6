"""Rows in text files, of which nothing is kept but where they stand: lines of JSON, elements of a JSON array, CSV."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import os
import tempfile
import threading
import weakref
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from vismem_core.errors import DataError

from .window import LONGEST, PIECE, Window

Row = bytes | Mapping[str, Any]
"""A line that holds JSON, or what a row holds by column."""

PACKED, UNPACKED = 200, 2**30
"""How many times its size a compressed file may grow to, where that is more than so many bytes: it fills a disk."""


def text_rows(path: Path) -> Lines | Elements | Cells:
    """The rows of a text file.

    Raises:
        DataError: it cannot be read, or unpacked; the message names it.
    """
    text = Text(path)
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return Cells(text, "\t" if suffix == ".tsv" else ",")
    return Elements(text) if text.start().removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[" else Lines(text)


class Text:
    """The bytes of a file, of which any span may be read again; a compressed one is unpacked into a temporary file."""

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, threading.Lock()
        with self.told():
            self.file: BinaryIO = path.open("rb", buffering=0)
            start = self.file.read(2)
            if start == b"\x1f\x8b":
                with self.file as packed:
                    self.file = _unpacked(packed, path)
            elif start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) and path.suffix.lower() not in (".csv", ".tsv"):
                raise DataError(f"{path}: is UTF-16; convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)")
            self.state = self._now()
        weakref.finalize(self, self.file.close)

    def _now(self) -> tuple[int, int]:
        now = os.fstat(self.file.fileno())
        return now.st_size, now.st_mtime_ns

    def start(self) -> bytes:
        return self.span(0, min(4096, self.state[0]))

    def whole(self) -> io.BufferedReader:
        """All of it, from its start; of several readers at a time each has a place of its own."""
        return io.BufferedReader(_Raw(self), PIECE)

    def span(self, start: int, end: int) -> bytes:
        """Some of its bytes.

        Raises:
            DataError: the file is not what it was when it was opened.
        """
        with self.told(), self._lock:
            if self._now() != self.state:
                raise DataError(f"{self.path}: changed while it was used; start again")
            self.file.seek(start)
            return self.file.read(end - start)

    def told(self) -> Told:
        """What goes wrong while the file is read, with its name."""
        return Told(self.path)


class Told:
    """Errors of reading one file, in one line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (EOFError, zlib.error, gzip.BadGzipFile)):
            raise DataError(f"{self.path}: is compressed by gzip and damaged: {error}") from error
        if isinstance(error, UnicodeDecodeError):
            raise DataError(f"{self.path}: is not UTF-8: {error}") from error
        if isinstance(error, csv.Error):
            raise DataError(f"{self.path}: is no such table: {error}") from error
        if isinstance(error, OSError):
            raise DataError(f"{self.path}: cannot be read: {error.strerror}") from error


class _Raw(io.RawIOBase):
    """A text's bytes as a file."""

    def __init__(self, text: Text) -> None:
        self.text, self.at = text, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, at: int, whence: int = io.SEEK_SET) -> int:
        self.at = at + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.text.state[0]}[whence]
        return self.at

    def readinto(self, buffer: Any) -> int:
        data = self.text.span(self.at, self.at + len(buffer))
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


def _unpacked(packed: BinaryIO, path: Path) -> BinaryIO:
    size = os.fstat(packed.fileno()).st_size
    packed.seek(0)
    room: Any = tempfile.TemporaryFile(prefix="vismem-", buffering=0)  # noqa: SIM115 - it outlives this call
    with gzip.GzipFile(fileobj=packed) as file:
        while data := file.read(PIECE):
            try:
                room.write(data)
            except OSError as error:
                raise DataError(f"{path}: there is no room to unpack it in {tempfile.gettempdir()} (TMPDIR)") from error
            if room.tell() > max(UNPACKED, PACKED * size):
                raise DataError(f"{path}: unpacks to more than {PACKED} times its size; if you trust it, unpack it")
    return room  # type: ignore[no-any-return]


class _Spans:
    """Rows that stand in a file one after another."""

    def __init__(self, text: Text) -> None:
        self.text, self.starts, self.ends = text, array("q"), array("q")

    def _stands(self, start: int, end: int) -> None:
        self.starts.append(start)
        self.ends.append(end)

    def _bytes(self, at: int) -> bytes:
        return self.text.span(self.starts[at], self.ends[at])


class Lines(_Spans):
    """A JSON object on each line, which is left as it is."""

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        with self.text.whole() as file:
            at = len(codecs.BOM_UTF8) if self.text.start().startswith(codecs.BOM_UTF8) else 0
            file.seek(at)
            for number, line in enumerate(iter(lambda: file.readline(LONGEST), b""), 1):
                if len(line) == LONGEST:
                    raise DataError(f"{self.text.path}:{number}: is longer than {LONGEST:,} bytes")
                if line.strip():
                    self._stands(at, at + len(line))
                    yield number, line
                at += len(line)

    def again(self, at: int) -> Row:
        return self._bytes(at)


class Elements(_Spans):
    """The objects of one JSON array, which may go over several lines."""

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        path, line = self.text.path, 1
        with self.text.told(), self.text.whole() as file:
            window = Window(file)
            line += window.skip(window.text.index("[") + 1)
            while True:
                line += window.skip_between()
                if window.ended:
                    raise DataError(f"{path}:{line}: the list of rows does not end; the file is perhaps cut off")
                if window.text[window.at] == "]":
                    return
                try:
                    row, own = window.value()
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{path}:{line}: {window.why(error)}") from error
                if not isinstance(row, Mapping):
                    raise DataError(f"{path}:{line}: expected an object for each row, got {str(row)[:40]!r}")
                start = window.start + window.at
                self._stands(start, start + len(own))
                yield line, row if own.isascii() else json.loads(own.encode("latin-1"))
                line += window.skip(len(own))

    def again(self, at: int) -> Row:
        row: Row = json.loads(self._bytes(at))
        return row


class Cells(_Spans):
    """The rows of a table with a line of names; empty cells are none."""

    def __init__(self, text: Text, delimiter: str) -> None:
        super().__init__(text)
        self.delimiter, self.names = delimiter, list[str]()

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        own = self.text.path
        with self.text.told(), self.text.whole() as file:
            start = len(codecs.BOM_UTF8) if self.text.start().startswith(codecs.BOM_UTF8) else 0
            file.seek(start)
            lines = _Counted(io.TextIOWrapper(file, encoding="utf-8", newline=""), start)
            table = csv.reader(lines, delimiter=self.delimiter, strict=True)
            self.names = next(table, [])
            start = lines.at
            for cells in table:
                if len(cells) > len(self.names):
                    told = f"more cells than columns; quote what holds {self.delimiter!r}"
                    raise DataError(f"{own}:{table.line_num}: {told}")
                if cells:
                    self._stands(start, lines.at)
                    yield table.line_num, self._row(cells)
                start = lines.at

    def again(self, at: int) -> Row:
        lines = io.StringIO(self._bytes(at).decode(), newline="")
        return self._row(next(csv.reader(lines, delimiter=self.delimiter, strict=True)))

    def _row(self, cells: list[str]) -> Row:
        return {name: cell for name, cell in zip(self.names, cells, strict=False) if cell}


class _Counted:
    """Lines of text, and at which byte the next one begins."""

    def __init__(self, lines: Iterable[str], at: int) -> None:
        self.lines, self.at = iter(lines), at

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self.lines)
        self.at += len(line) if line.isascii() else len(line.encode())
        return line
