"""`metrics.jsonl`: a row per step, the same ones whether a run was interrupted or not."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from vismem_core.files import checkpoint


class Metrics:
    """The file, open for one stage from the step after ``steps`` on.

    Rows of steps that an interrupted run took after its last saved state are dropped.

    Args:
        order: of the stages in a run.
        writes: False in all processes but the first.
    """

    def __init__(self, path: Path, order: Sequence[str], stage: str, steps: int, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self._file: TextIO
        if writes:
            _cut(path, order, stage, steps)

    def __enter__(self) -> Metrics:
        if self.writes:
            self._file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        if self.writes:
            self._file.close()

    def add(self, row: dict[str, Any]) -> None:
        """Write one row, numbers with six digits."""
        if self.writes:
            self._file.write(finite_json({key: _short(value) for key, value in row.items()}) + "\n")
            self._file.flush()  # for whoever watches

    def flush(self) -> None:
        """Before the state is saved: what it builds on is on disk."""
        if self.writes:
            self._file.flush()


def _cut(path: Path, order: Sequence[str], stage: str, steps: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if (order.index(row["stage"]), row["step"]) > (order.index(stage), steps):
            break
        kept.append(line + "\n")
    checkpoint.atomically(path, lambda place: place.write_text("".join(kept), encoding="utf-8"))


def finite_json(value: Any, indent: int | None = None) -> str:
    """JSON, in which what is no finite number is null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value
