"""Whole runs on the tiny model, a second each, for tests of what runs write and survive."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny import picture, qwen

import vismem_core as vismem
from vismem_core.config import Config, load
from vismem_core.files.samples import Dataset, Sample
from vismem_core.files.samples import read as read_rows
from vismem_core.training.run import train

GROUPS = {"seen": ("colour",), "new": ("shape",)}
SETTINGS = [
    "train.formation={steps: 4, batch: 3, lr: 1e-3}",
    "train.invocation={steps: 3, batch: 3, lr: 1e-2}",
    "train.save_every=2",
    "train.eval_samples=2",
    "train.max_new_tokens=4",
]


def samples() -> list[Sample]:
    return [
        Sample(str(n), (picture(16, 16 + 8 * (n % 3), n),), "what is left ?", ("a bag , a boot .", "boot")[n % 2], kind)
        for n, kind in enumerate(("colour", "shape") * 4)
    ]


def run(
    output: Path,
    overrides: list[str] | None = None,
    data: Any = None,
    heldout: Any = None,
    base: tuple[Any, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train in ``output``; by default on :func:`samples` and the tiny Qwen."""
    config: Config = load(None, [*SETTINGS, *(overrides or [])])
    memory = vismem.attach(*(base or qwen()), config=config.memory)
    return train(memory, data or samples(), heldout or samples(), config, output, groups=GROUPS, **options)


def rows(folder: Path, count: int = 8) -> list[dict[str, Any]]:
    """The same questions as rows of a file in ``folder``, which gets their images."""
    folder.mkdir(parents=True, exist_ok=True)
    told = []
    for number, sample in enumerate([*samples(), *samples()][:count]):
        name = f"{number}.png"
        picture(16, 16 + 8 * (number % 3), number).save(folder / name)
        told.append(
            {"id": str(number), "image": name, "prompt": sample.prompt, "answer": sample.answer, "type": sample.type}
        )
    return told


def written(path: Path, told: list[dict[str, Any]]) -> Path:
    """A file of rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in told))
    return path


def read(path: Path, **options: Any) -> Dataset:
    """What is in a file of rows."""
    return read_rows(path, need_answer=True, **options)


GRPO = [
    "train.objective=grpo",
    "train.grpo={group: 3, max_new_tokens: 6, rewards: ['call:samples:even']}",
    "train.grpo.formation={steps: 4, batch: 2, lr: 1e-3}",
    "train.grpo.invocation={steps: 3, batch: 2, lr: 1e-2}",
]


RESAMPLING = [own.replace("even'", "fickle'").replace("{group", "{resample: 2, group") for own in GRPO]
