"""What the program says of itself: help that fits a terminal, and names that the shell completes."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

import vismem_cli
from vismem_cli import main
from vismem_cli.app import OWN, app
from vismem_core.config import Config
from vismem_core.plugins import registry

PANELS = {"Arguments", "Data", "Model", "Memory", "Training", "Output", "Server"}


@pytest.mark.parametrize("command", OWN)
def test_help_fits_eighty_columns_and_sorts_its_options(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    told = CliRunner().invoke(app, [command, "--help"], terminal_width=80)
    assert told.exit_code == 0
    lines = told.stdout.splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in told.stdout
    assert {name for line in lines for name in re.findall(r"^╭─ (\w+) ─", line)} <= PANELS
    group = typer.main.get_command(app)
    with group.make_context("vismem", [command, "--help"], resilient_parsing=True) as above:
        named = group.get_command(above, command).become()  # type: ignore[attr-defined]
    shown = {word for line in lines for word in re.findall(r"^│ \*? *(--[\w-]+)", line)}
    assert {own.opts[-1] for own in named.params if own.param_type_name == "option"} <= shown | {"--private"}


def test_every_command_is_listed() -> None:
    modules = {
        path.stem for path in Path(str(vismem_cli.__file__)).parent.glob("*.py") if "\nEXAMPLE = " in path.read_text()
    }
    assert {target.partition(":")[0] for target, _ in OWN.values()} == modules


KEYS = {f"{part}.{own.name}" for part in ("memory", "train") for own in fields(getattr(Config(), part))}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("vismem in", {"infer"}),
        ("vismem train --backbone ", {*registry("backbones").names(), *registry("bases").names()}),
        ("vismem infer --backbone gem", {own for own in registry("backbones").names() if own.startswith("gem")}),
        ("vismem train --stage ", {"formation", "invocation", "all"}),
        ("vismem infer --trigger ", set(registry("triggers").names())),
        ("vismem experiment ", {*registry("experiments").names(), "all", "list", "show"}),
        ("vismem eval --metric e", {"exact", "ending"}),
        ("vismem eval --data mo", {"mosaic"}),
        (
            "vismem train --set train.grpo.formation.w",
            {f"train.grpo.formation.w{own}=" for own in ("armup", "eight_decay")},
        ),
        ("vismem probe --per", {"--per-type"}),
    ],
)
def test_the_shell_completes(
    line: str, expected: set[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert completed(line, monkeypatch, capsys) == expected


def test_every_setting_is_completed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = completed("vismem train --set ", monkeypatch, capsys)
    assert {".".join(own.rstrip("=").split(".")[:2]) for own in found} == KEYS


def completed(line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> set[str]:
    told = {"_VISMEM_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        main([])
    return set(capsys.readouterr().out.split())


def test_completion_imports_nothing_heavy() -> None:
    code = """import os, sys, vismem_cli
os.environ |= {"_VISMEM_COMPLETE": "complete_bash", "COMP_WORDS": "vismem train --set memory.b", "COMP_CWORD": "3"}
try: vismem_cli.main([])
finally: print({"torch", "numpy", "transformers"} & set(sys.modules))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "memory.budget=\nset()\n", done.stderr
