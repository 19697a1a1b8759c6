"""Answers as a JSONL file that an interrupted run can go on with."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from vismem_core.errors import DataError

from .lock import alone
from .samples import Part, Sample


class Results:
    """Appends rows to a file, each on disk before the next is made.

    Complete rows that the file already holds are kept, and ``kept`` says which question (``Sample.digest``) each id
    answers; a last line that was cut off while it was written is dropped.

    Args:
        made: how answers are made (memory, trigger, ...); it is written into every row as ``made``.
        writes: whether this process does; of several that make the same answers one does, and the others read.

    Raises:
        VismemError: another program writes to the file.
        DataError: the file holds something else than answers with their ``question``, or answers made otherwise.
        OSError: it cannot be written; ``filename`` says which file.
    """

    def __init__(self, path: Path, made: Mapping[str, Any], *, writes: bool = True) -> None:
        self.path, self.made = path, dict(made)
        self.kept: dict[str, str] = {}
        with ExitStack() as stack:
            if writes:
                path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(alone(path))
            self._enter(writes)
            self._alone = stack.pop_all()

    def _enter(self, writes: bool) -> None:
        path = self.path if writes or self.path.exists() else Path(os.devnull)
        with path.open("ab+" if writes else "rb") as file:
            file.seek(0)
            complete = 0
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    self._cut_off(number, line)
                    break
                self.kept.update([self._read(number, line)])
                complete += len(line)
            if writes:
                file.truncate(complete)
        self._file = (path if writes else Path(os.devnull)).open("a", encoding="utf-8")

    def _read(self, number: int, line: bytes) -> tuple[str, str]:
        try:
            row = json.loads(line)
            row["text"]  # questions have an id too
            known, made = (str(row["id"]), str(row["question"])), dict(row["made"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.path}:{number}: not an answer; choose another output file") from error
        for name in sorted(self.made.keys() | made.keys()):
            if (was := made.get(name)) != (now := self.made.get(name)):
                told = f"answered with {name} {was!r}, not {now!r}"
                raise DataError(f"{self.path}:{number}: {told}; choose another output file, or remove this one")
        return known

    def _cut_off(self, number: int, line: bytes) -> None:
        """A last line may be dropped if it is the beginning of an answer, not somebody's whole row."""
        try:
            json.loads(line)
        except ValueError:
            if line.startswith(b'{"id"'[: len(line)]):
                return
        self._read(number, line)

    def left(self, samples: Sequence[Sample]) -> Sequence[Sample]:
        """The samples that have no answer yet.

        Raises:
            DataError: an answer to another question under a sample's id.
        """
        left = array("q")
        for at, sample in enumerate(samples):
            if sample.id not in self.kept:
                left.append(at)
            elif self.kept[sample.id] != sample.digest():
                raise DataError(
                    f"{self.path}: {sample.id!r} answers another prompt or image; choose another output file, or "
                    "remove this one"
                )
        return Part(samples, left)

    def add(self, row: Mapping[str, Any]) -> None:
        """Append one row, which must have an ``id``."""
        try:
            self._file.write(json.dumps({**row, "made": self.made}, ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:  # a failed write does not say which file
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def __enter__(self) -> Results:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._alone:
                self._file.close()
        except OSError:
            if kind is None:
                raise
