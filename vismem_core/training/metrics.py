"""`metrics.jsonl` and `samples.jsonl`: rows of a run, the same ones whether it was interrupted or not."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from vismem_core.files import checkpoint

Mark = tuple[int, int]
"""How far a stage is: its step, and there 0 for the step alone, 1 for an evaluation, 2 for the finished stage's."""


class Metrics:
    """A file of rows, for one stage.

    Rows behind ``mark``, of what an interrupted run did after its last saved state, are dropped.

    Args:
        order: of the stages in a run.
        writes: False in all processes but the first.
    """

    def __init__(self, path: Path, order: Sequence[str], stage: str, mark: Mark, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self._file: TextIO | None = None
        if writes:
            _cut(path, order, stage, mark)

    def open(self) -> None:
        """Make the file, which its first row would make too."""
        if self.writes:
            self._file = self._file or self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        """No more rows."""
        if self._file:
            self._file.close()

    def add(self, row: dict[str, Any]) -> None:
        """Write one row, numbers with six digits."""
        self.open()
        if self._file:
            self._file.write(finite_json({key: short(value) for key, value in row.items()}) + "\n")
            self._file.flush()  # for whoever watches

    def flush(self) -> None:
        """Before the state is saved: what it builds on is on disk."""
        if self._file:
            self._file.flush()


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, up to a last one that was cut off while it was written."""
    found: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def evaluated(row: Mapping[str, Any]) -> bool:
    """Whether a row is of an evaluation, and of no step."""
    return "finished" in row


def _cut(path: Path, order: Sequence[str], stage: str, mark: Mark) -> None:
    if not path.exists():
        return
    found, last = rows(path), (order.index(stage), *mark)
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    ahead = (at for at, row in enumerate(found) if (order.index(row["stage"]), *_mark(row)) > last)
    kept = "".join(lines[: next(ahead, len(found))])
    checkpoint.atomically(path, lambda place: place.write_text(kept, encoding="utf-8"))


def _mark(row: Mapping[str, Any]) -> Mark:
    return row["step"], 1 + row["finished"] if evaluated(row) else 0


def finite_json(value: Any, indent: int | None = None) -> str:
    """JSON, in which what is no finite number is null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def short(value: Any) -> Any:
    """A number with six digits."""
    return float(f"{value:.6g}") if isinstance(value, float) else value
