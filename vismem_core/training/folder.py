"""The folder of a run: its files, and that no other run overwrites them."""

from __future__ import annotations

from pathlib import Path

from ..errors import TrainingError

METRICS, REPORT, SETTINGS = "metrics.jsonl", "report.json", "config.json"


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
