"""The notebooks run to their end; the one for a GPU with the embedded model in the place of the real one."""

from __future__ import annotations

import ast
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from vismem_core.base.embedded import embedded
from vismem_core.files.samples import read

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.long


def executed(name: str, place: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any] | None = None) -> str:
    """What a notebook prints, run in a folder of its own, with other values in its first cell of code."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)  # where vismem is
    book = nbformat.read(ROOT / "docs" / "notebooks" / f"{name}.ipynb", as_version=4)
    first = next(own for own in book.cells if own.cell_type == "code")
    if values is not None:
        assert {own.id for own in ast.walk(ast.parse(first.source)) if isinstance(own, ast.Name)} == values.keys()
        first.source = "\n".join(f"{key} = {value!r}" for key, value in values.items())
    nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": str(place)}}).execute()
    outputs = [output for own in book.cells for output in own.get("outputs", ())]
    told = "".join(output.get("text", "") for output in outputs)
    assert "error:" not in told
    return told


def test_the_laptops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = executed("laptop", tmp_path, monkeypatch)
    assert "with memory: <ms_I><ms_E>dress" in told
    assert re.search(r"long memory: <ml_I><ml_E>\w+", told) and re.search(r"noise:       <ml_I><ml_E>\w+", told)
    assert re.search(r"^formation 1 \d", told, re.MULTILINE) and re.search(r"^invocation 1 ", told, re.MULTILINE)


def test_the_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, shipped = embedded()
    assert shipped.samples
    asked, rows = read(shipped.samples)[0], str(shipped.samples)
    values = {"MODEL": str(shipped.model), "DATA": rows, "HELDOUT": rows, "IMAGE": str(asked.images[0])}
    values |= {"QUESTION": asked.prompt, "OUTPUT": "run", "DEVICE": "cpu", "DTYPE": "float32", "PER_TYPE": 1}
    values |= {"SETTINGS": "--set train.formation.steps=1 --set train.invocation.steps=1"}
    told = executed("gpu", tmp_path, monkeypatch, values)
    assert re.search(r"qwen2_5_vl: [\d,]+ trained beside", told)
    assert len(re.findall(r"^memory     [01]\.\d{3}$", told, re.MULTILINE)) == 2  # as trained, and measured again
    assert "with memory: " in told and "without: " in told
