"""The README's and the guides' commands and the README's Python run as they stand; training is only made shorter."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import warm

from vismem_core.experiments.probe import verdict

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDES = [
    (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    for name in ("index", "attach", "python", "training", "measuring", "publish", "data")
]
SHORT = {
    "train": "--set train.formation.steps=2 --set train.invocation.steps=2 --set train.eval_samples=2 "
    "--set train.grpo.formation.steps=1 --set train.grpo.formation.batch=2 "
    "--set train.grpo.invocation.steps=1 --set train.grpo.invocation.batch=2",
    "eval": "--per-type 4",
    "probe": "--per-type 2",
    "examples/trainers.py": "--steps 2",
    "examples/measure_data.py": "--rows 2000 --formats jsonl",
    "examples/benchmark.py": "--only a --tokens 16 --repeats 1 --set text.num_hidden_layers=1",
}
"""What makes a command of minutes one of seconds."""


def blocks(language: str, *texts: str) -> list[str]:
    return [found for text in texts for found in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)]


def commands() -> list[list[str]]:
    return [
        shlex.split(line, comments=True)
        for block in blocks("sh", README, *GUIDES)
        for line in block.replace("\\\n", " ").splitlines()
        if line.strip()
    ]


OURS = [list(words) for words in dict.fromkeys(map(tuple, commands())) if words[0] in ("vismem", "python")]


def test_training_is_the_first_of_our_commands() -> None:
    assert OURS[0] == ["vismem", "train", "--backbone", "qwen2_5_vl"]


@pytest.mark.long
def test_the_commands_run(tmp_path: Path) -> None:
    for name in ("examples", "plugins"):  # a directory that looks like the repository's root to a command
        (tmp_path / name).symlink_to(ROOT / name)
    first = [sys.executable, "-m", "vismem_cli", *OURS[0][1:], *SHORT["train"].split()]
    subprocess.run(first, cwd=tmp_path, capture_output=True, check=True)  # as a user's, with nothing imported before
    with warm.commands() as run:
        for words in OURS[1:]:  # in order and in one place: later ones need what earlier ones left
            ran = run([*words, *SHORT.get(words[1], "").split()], tmp_path)
            assert ran.returncode == 0, f"{shlex.join(words)}\n{ran.stderr[-2000:]}"


def test_the_python_runs(tmp_path: Path) -> None:
    (code,) = blocks("python", README)
    run_python(code, tmp_path)


@pytest.mark.long
def test_the_guides_python_runs(tmp_path: Path) -> None:
    for code in blocks("python", *GUIDES):
        run_python(code, tmp_path)


def run_python(code: str, place: Path) -> None:
    ran = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "<ms_I><ms_E>dress" in ran.stdout and "Invocation(row=0, kind='short', position=0)" in ran.stdout


def test_the_probe_found_what_the_table_says() -> None:
    text = (ROOT / "docs/evidence/README.md").read_text(encoding="utf-8")
    part = text[text.index("## What latents hold") :].split("\n## ")[0]
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines() if line[:1] == "|"]
    told = {path.stem: json.loads(path.read_text()) for path in (ROOT / "docs/evidence/probe").glob("*.json")}
    assert {row[0].strip("`") for row in rows} == told.keys()
    for name, kind, *figures in rows:
        found = told[name.strip("`")]["kinds"][kind]
        assert figures == [f"{found['conditions'][column]['accuracy']:.3f}" for column in head[2:]]
        assert verdict(kind, found) == found["verdict"]
        assert " ".join(found["verdict"].split()).lower() in " ".join(part.split()).lower()


def test_ci_installs_and_tests_as_the_readme_says() -> None:
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    others = [words for words in commands() if words[0] in ("pip", "pytest")]
    assert [words[0] for words in others] == ["pip", "pytest", "pytest"]
    assert others[0] == ["pip", "install", "-e", ".[test,dev]"] and '-e ".[test,dev]"' in script
    assert "\npytest\npytest -m long\n" in script
