"""The folder of a run: its files, what the run stands on, and that no other run overwrites them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vismem_core.config import Config, from_dict
from vismem_core.errors import TrainingError
from vismem_core.files.samples import Sample, fingerprint

if TYPE_CHECKING:
    from vismem_core.memory.memory import Memory

METRICS, SAMPLES, SETTINGS, BASIS = "metrics.jsonl", "samples.jsonl", "config.json", "run.json"
BEST = "best"
"""The folder of the memory that was best in held-out evaluations."""


@dataclass(frozen=True)
class Basis:
    """What a run stands on beside its settings; it goes on with the same or not at all.

    Attributes:
        base: as :func:`vismem_core.files.checkpoint.describe` says, its precision among it.
        data, heldout: ``source`` (path or name, for people and ``--resume``), ``samples`` and ``digest``.
        processes: how many shared each step's batch.
        rows: how rows are read and checked.
    """

    base: Mapping[str, Any]
    data: Mapping[str, Any]
    heldout: Mapping[str, Any]
    processes: int
    rows: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        memory: Memory,
        data: Sequence[Sample],
        heldout: Sequence[Sample],
        processes: int,
        rows: Mapping[str, Any],
    ) -> Basis:
        from vismem_core.files.checkpoint import describe  # brings torch

        base = describe(memory.backbone) | {"dtype": str(memory.backbone.dtype).removeprefix("torch.")}
        return cls(base, _told(data), _told(heldout), processes, rows)

    def check(self, now: Basis, path: Path) -> None:
        """See that a run which stands on this may go on with ``now``.

        Raises:
            TrainingError: the base, its precision or the data are others.
        """
        for key in ("backbone", "width", "vision_width", "vocabulary", "fingerprint", "dtype"):
            if (was := self.base.get(key)) != (found := now.base.get(key)):
                name = self.base.get("name") or "the embedded base"
                flag = "--dtype" if key == "dtype" else "--model"
                raise TrainingError(
                    f"{path}: the run trains on {name} ({key} {was}), and this base is another ({key} {found}); "
                    f"--resume needs no {flag}, or choose another --output"
                )
        for name, before, after in (("data", self.data, now.data), ("heldout", self.heldout, now.heldout)):
            if before["digest"] != after["digest"]:
                same = before["source"] and before["source"] == after["source"]
                why = "it has changed since, or its images have" if same else f"--resume needs no --{name}"
                raise TrainingError(
                    f"{path}: the run's {name} is {_shown(before)}, and this is {_shown(after)}: other rows or images; "
                    f"{why}, or choose another --output"
                )
            if before["samples"] != after["samples"]:
                raise TrainingError(
                    f"{path}: of the run's {name}, {before['samples']} samples were usable, and {after['samples']} are "
                    "now: give the same --check and --on-bad-sample"
                )

    def write(self, output: Path) -> None:
        """Into the folder of the run."""
        from vismem_core.files.checkpoint import atomically  # brings torch

        text = json.dumps(asdict(self), indent=2) + "\n"
        atomically(output / BASIS, lambda path: path.write_text(text, encoding="utf-8"))


def _told(data: Sequence[Sample]) -> dict[str, Any]:
    told = {"source": getattr(data, "source", ""), "samples": len(data), "digest": fingerprint(data)}
    columns = getattr(data, "columns", None)
    return told | {"columns": dict(columns)} if columns else told


def _shown(told: Mapping[str, Any]) -> str:
    return f"{told['source'] or 'given in Python'} (digest {told['digest']})"


def basis(output: Path) -> Basis | None:
    """What the run in a folder stands on, if there is one and it says so.

    Raises:
        TrainingError: the file is damaged.
    """
    path = output / BASIS
    if not path.exists():
        return None
    try:
        told = Basis(**read_json(path))
        for part in (told.data, told.heldout):
            {**told.base, **told.rows, "": (part["digest"], part["samples"], part["source"])}
        if not isinstance(told.processes, int):
            raise TypeError("processes is no number")
    except (TypeError, KeyError) as error:
        raise TrainingError(f"{path}: damaged ({error}); restore it, or begin anew in another --output") from error
    return told


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of a run.

    Raises:
        TrainingError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        why = getattr(error, "strerror", None) or error
        raise TrainingError(f"{path}: damaged ({why}); restore it, or begin anew in another --output") from error
    if not isinstance(content, dict):
        raise TrainingError(f"{path}: damaged (no JSON object); restore it, or begin anew in another --output")
    return content


def settings(output: Path) -> Config | None:
    """The settings of the run in a folder, if there is one.

    Raises:
        TrainingError, ConfigError: they are damaged or another version's.
    """
    path = output / SETTINGS
    return from_dict(Config, read_json(path), str(path)) if path.exists() else None


def refuse(output: Path, resume: bool) -> None:
    """See that a run may go into ``output``.

    Raises:
        TrainingError: it would overwrite what is there.
    """
    if (output / SETTINGS).exists():
        if not resume:
            raise TrainingError(f"{output}: holds a run; --resume it, or choose another --output")
    elif output.exists() and (not output.is_dir() or any(_foreign(path) for path in output.iterdir())):
        raise TrainingError(f"{output}: not empty, and no run of vismem; choose another --output")


def _foreign(path: Path) -> bool:
    """Whether it is more than the traces of a run that was killed before it began."""
    return not path.name.startswith(".") and path.name != BASIS
