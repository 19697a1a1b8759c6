"""Where a stage's figures go: the files of its run, trackers, the display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .display import Display
from .folder import METRICS, SAMPLES
from .metrics import Mark, Metrics
from .trackers import Trackers


class Record:
    """Open for one stage.

    Args:
        order, mark, writes: see :class:`vismem_core.training.metrics.Metrics`.
    """

    def __init__(
        self,
        folder: Path,
        order: Sequence[str],
        stage: str,
        mark: Mark,
        writes: bool,
        trackers: Trackers,
        display: Display,
    ) -> None:
        self._metrics, self._samples = (
            Metrics(folder / name, order, stage, mark, writes) for name in (METRICS, SAMPLES)
        )
        self._trackers, self.display = trackers, display

    def __enter__(self) -> Record:
        self._metrics.open()
        return self

    def __exit__(self, *_: object) -> None:
        self._metrics.close()
        self._samples.close()

    def write(self, row: dict[str, Any], answers: Sequence[dict[str, Any]] = ()) -> None:
        """A step's or an evaluation's row into the files, with some of its answers."""
        self._metrics.add(row)
        place = {key: row[key] for key in ("stage", "step", "finished") if key in row}
        for own in answers:
            self._samples.add(place | own)

    def flush(self) -> None:
        """Before the state is saved: what it builds on is on disk."""
        self._metrics.flush()
        self._samples.flush()

    def stepped(self, row: dict[str, Any]) -> None:
        """Show a step."""
        self._trackers.log(row)
        self.display.step(row)

    def evaluated(self, row: dict[str, Any], answers: Sequence[dict[str, Any]], best: bool) -> None:
        """Show an evaluation."""
        self._trackers.evaluated(row, answers)
        self.display.evaluated(row, best)
