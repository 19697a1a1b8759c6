"""The public suite on every image-text-to-text type that transformers knows: ``python tests/conformance/survey.py``.

Writes docs/model_types.md, and the same for ``vismem backbones --check``; with types as arguments it renews their lines
alone.
"""

from __future__ import annotations

import inspect
import json
import multiprocessing
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import product
from multiprocessing.connection import wait
from pathlib import Path
from time import monotonic
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch
import transformers

from vismem_core.base import outlook
from vismem_core.base.families import find_backbone
from vismem_core.errors import AttachError
from vismem_core.plugins import reason
from vismem_core.testing import BackboneContract

sys.path.insert(0, str(Path(__file__).parent))

from model_types import TYPES, build

DOCUMENT = Path(__file__).parents[2] / "docs" / "model_types.md"
RECORD = Path(__file__).parents[2] / "backbones" / "vismem_backbones" / "model_types.json"
LIMIT = 180
"""Seconds for one type."""
Line = dict[str, str]
"""``backbone``, ``outcome``, ``layers`` of the tiny model's cache, what memory does ``without``, and ``why``."""
HEAD = """# Model types

What memory does with the image-text-to-text types of transformers {version}: the public conformance suite on tiny
random models. "refused" is said in one line when memory is attached. "fails" means that memory attaches and breaks a
promise; do not use it there. "not built" means that no tiny model of the type, or no input for it, could be made here,
so nothing is known. The tiny models are the published layouts made small.

Layers are what the language model keeps of each row: all tokens, those in a window, all and what an indexer chooses
them by ("indexed"), or a state of a convolution or linear attention. Without "encoder", extra tokens have no way
through the vision encoder: short memory is formed by a former that stands alone. Without "recompute" or "dropping",
`context="recompute"` or `drop_image_after_invocation` is refused.

{counts}

Renew it with `python tests/conformance/survey.py`.

| type | backbone | outcome | layers | without | why |
|---|---|---|---|---|---|
"""


def survey(model_type: str) -> Line:
    """The suite on one type."""
    try:
        model, processor = build(model_type)
    except Exception as error:  # default configurations may not be made for such sizes
        return line("", "not built", _short(error))
    family = find_backbone(model)
    about = {"layers": layers(model.config)}
    try:
        backbone = family(model, processor)
    except AttachError as error:
        made = "blank image" in str(error)
        return line(family.name, "not built" if made else "refused", _short(error), **about)
    except Exception as error:
        return line(family.name, "fails", f"attaching: {_short(error)}", **about)
    lacks = {
        "encoder": backbone.blind,
        "recompute": not backbone.rereads,
        "dropping": outlook.keeps_images(model.config),
    }
    about["without"] = ", ".join(name for name, own in lacks.items() if own)
    try:
        contract(family.name, model_type).test_the_model_looks_at_its_image()
    except AssertionError as error:
        return line(family.name, "not built", _short(error.__cause__ or error), **about)
    failed, count = [], 0
    for name, arguments in checks():
        count += 1
        try:
            getattr(contract(family.name, model_type), name)(**arguments)
        except pytest.skip.Exception:
            count -= 1
        except Exception as error:
            failed.append(f"{name.removeprefix('test_')}: {_short(error.__cause__ or error)}")
    if failed:
        return line(family.name, "fails", f"{len(failed)} of {count} checks, first {failed[0]}", **about)
    return line(family.name, "passes", "every check", **about)


def layers(config: Any) -> str:
    try:
        return ", ".join(f"{count} {kind}" for kind, count in outlook.layers(config).items())
    except Exception:  # a configuration that names kinds which this version does not know
        return ""


def line(backbone: str, outcome: str, why: str, layers: str = "", without: str = "") -> Line:
    return {"backbone": backbone, "outcome": outcome, "layers": layers, "without": without, "why": why}


def contract(backbone_name: str, model_type: str) -> BackboneContract:
    """The suite as an author would write it."""

    class Contract(BackboneContract):
        backbone = backbone_name

        def load(self) -> tuple[Any, Any]:
            return build(model_type)

    return Contract()


def checks() -> list[tuple[str, dict[str, Any]]]:
    """Every check of the suite, with each set of its parameters."""
    found = []
    for name, test in inspect.getmembers(BackboneContract):
        if name.startswith("test_"):
            marks = [mark.args for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
            for values in product(*(list(own[1]) for own in marks)):
                arguments: dict[str, Any] = {}
                for (names, _), value in zip(marks, values, strict=True):
                    arguments |= {names: value} if isinstance(names, str) else dict(zip(names, value, strict=True))
                found.append((name, arguments))
    return found


def _short(error: BaseException) -> str:
    told = reason(error).partition(" (found: ")[0].partition("model type ")[2] or reason(error)
    return told.partition("': ")[2][:160] if "': " in told and isinstance(error, AttachError) else told[:160]


def apart(model_types: Iterable[str]) -> Iterator[tuple[str, Line]]:
    """Each in a process of its own, since some image processors never end on small images; one for each core."""
    fork, waiting = multiprocessing.get_context("fork"), list(model_types)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    running: dict[str, tuple[Any, Path, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < cores:
                name = waiting.pop(0)
                told = Path(folder, str(len(waiting)))
                process = fork.Process(target=_tell, args=(name, told))
                process.start()
                running[name] = process, told, monotonic() + LIMIT
            wait([process.sentinel for process, *_ in running.values()], timeout=1)
            for name, (process, told, end) in list(running.items()):
                if process.is_alive() and monotonic() < end:
                    continue
                if process.is_alive():
                    process.kill()
                    yield name, line("", "not built", f"nothing after {LIMIT} seconds")
                else:
                    text = told.read_text(encoding="utf-8") if told.exists() else ""
                    yield name, json.loads(text) if text else line("", "fails", "died")
                del running[name]


def _tell(model_type: str, told: Path) -> None:
    torch.set_num_threads(1)
    told.write_text(json.dumps(survey(model_type)), encoding="utf-8")


def table(lines: dict[str, Line]) -> str:
    """The document."""
    counts = Counter(own["outcome"] for own in lines.values())
    told = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
    head = HEAD.format(version=transformers.__version__, counts=f"{len(lines)} types: {told}.")
    columns = ("backbone", "outcome", "layers", "without", "why")
    rows = [(name, *(own[column].replace("|", "/") for column in columns)) for name, own in lines.items()]
    return head + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def recorded() -> dict[str, Line]:
    """What was found before."""
    found: dict[str, Line] = json.loads(RECORD.read_text(encoding="utf-8"))["types"]
    return found


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    if unknown := [name for name in sys.argv[1:] if name not in TYPES]:
        sys.exit(f"usage: survey.py [TYPE ...]; unknown: {', '.join(unknown)}")
    lines = recorded() if sys.argv[1:] else {}
    for model_type, found in apart(sys.argv[1:] or TYPES):
        lines[model_type] = found
        print(model_type, *found.values(), sep=" | ", flush=True)  # noqa: T201
    lines = dict(sorted(lines.items()))
    DOCUMENT.write_text(table(lines), encoding="utf-8")
    record = {"transformers": transformers.__version__, "types": lines}
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
