"""The folder of a run: its files, and that no other run overwrites them."""

from __future__ import annotations

import json
from pathlib import Path

from ..config import Config, from_dict
from ..errors import TrainingError

METRICS, REPORT, SETTINGS = "metrics.jsonl", "report.json", "config.json"


def settings(output: Path) -> Config | None:
    """The settings of the run in a folder, if there is one.

    Raises:
        ConfigError: they are damaged or another version's.
    """
    path = output / SETTINGS
    return from_dict(Config, json.loads(path.read_text(encoding="utf-8")), str(path)) if path.exists() else None


def refuse(output: Path, resume: bool) -> None:
    """See that a run may go into ``output``.

    Raises:
        TrainingError: it would overwrite what is there.
    """
    if (output / SETTINGS).exists():
        if not resume:
            raise TrainingError(f"{output}: holds a run; --resume it, or choose another --output")
    elif output.exists() and any(output.iterdir()):
        raise TrainingError(f"{output}: not empty, and no run of vismem; choose another --output")
