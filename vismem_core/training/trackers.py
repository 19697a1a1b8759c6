"""Figures for tensorboard, wandb or trackio, by way of accelerate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.tracking import filter_trackers

from vismem_core.errors import ConfigError

TEXT = ("tensorboard",)
"""Trackers that show text beside figures."""


class Trackers:
    """The named trackers, open inside the context; none are no trouble.

    Raises:
        ConfigError: a tracker that accelerate does not know or that is not installed.
    """

    def __init__(self, names: Sequence[str], folder: Path, settings: dict[str, Any]) -> None:
        self._names, self._folder, self._settings = list(names), folder, settings
        self._step = 0
        self._accelerator: Accelerator | None = None
        PartialState()  # accelerate logs what it leaves out, and wants to know from which process
        for name in names:
            try:
                found = filter_trackers([name], logging_dir=str(folder))
            except ValueError as error:
                raise ConfigError(f"train.trackers: accelerate knows no tracker {name!r}") from error
            if not found:
                raise ConfigError(f"train.trackers: {name} is not installed (pip install {name})")

    def __enter__(self) -> Trackers:
        if self._names:
            self._accelerator = Accelerator(log_with=self._names, project_dir=str(self._folder))
            self._accelerator.init_trackers("vismem", config=dict(_flat(self._settings)))
        return self

    def __exit__(self, *_: object) -> None:
        if self._accelerator:
            self._accelerator.end_training()

    def log(self, row: dict[str, Any]) -> None:
        """One step's figures, under its stage's name."""
        self._step += 1
        self._log(row)

    def evaluated(self, row: dict[str, Any], answers: Sequence[dict[str, Any]]) -> None:
        """An evaluation's figures, and some of its answers where a tracker shows tables or text."""
        self._log(row)
        for tracker in self._accelerator.trackers if self._accelerator and answers else ():
            if hasattr(tracker, "log_table"):
                shown = ("way", "prompt", "marked", "references")
                table = [[str(own[key]) for key in shown] for own in answers]
                tracker.log_table(f"{row['stage']}/answers", list(shown), table, step=self._step)
            elif tracker.name in TEXT:
                tracker.log({f"{row['stage']}/answers": _text(answers)}, step=self._step)

    def _log(self, row: dict[str, Any]) -> None:
        if self._accelerator:
            figures = {f"{row['stage']}/{key}": value for key, value in row.items() if key not in ("stage", "step")}
            self._accelerator.log(figures, step=self._step)


def _text(answers: Sequence[dict[str, Any]]) -> str:
    """Answers with their invocations, as Markdown."""
    parts = (f"**{own['way']}**: {own['prompt']}\n\n> {own['marked']}\n\n{own['references']}" for own in answers)
    return "\n\n".join(parts)


def _flat(settings: dict[str, Any], path: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in settings.items():
        if isinstance(value, dict):
            found += _flat(value, f"{path}{key}.")
        else:
            found.append((f"{path}{key}", value if isinstance(value, int | float | str | bool) else str(value)))
    return found
