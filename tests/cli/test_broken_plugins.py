"""However a plugin is broken: the program runs, the other names are there, and ``vismem plugins`` says why."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

HOOK = "from vismem_core.hookspecs import hookimpl\n\n@hookimpl\ndef {}({}):\n    {}\n"
BROKEN = {
    "lost": ("import not_installed", "No module named 'not_installed'"),
    "raising": (HOOK.format("register_backbones", "register", "raise ValueError('no')"), "ValueError: no"),
    "misspelt": (HOOK.format("register_backbone", "register", "pass"), "did you mean 'register_backbones'?"),
    "signature": (HOOK.format("register_backbones", "registry", "pass"), "registry"),
    "duplicate": (HOOK.format("register_backbones", "register", "register('llava', 'a:b')"), "'llava' is already"),
    "outdated": ("VISMEM_API = 0\n" + HOOK.format("register_backbones", "register", "pass"), "version 0 of vismem's"),
    "exiting": ("raise SystemExit(3)", "SystemExit: 3"),
    "recursive": ("def f(): f()\nf()", "RecursionError"),
}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A process environment with every broken plugin installed, and a good one after them."""
    place = tmp_path_factory.mktemp("broken")
    good = HOOK.format("register_backbones", "register", "register('sound', 'a:b')")
    for name, source in {**{name: source for name, (source, _) in BROKEN.items()}, "sound": good}.items():
        (place / f"vm_{name}.py").write_text(source)
        info = place / f"vm_{name}-2.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vm_{name}\nVersion: 2.0\n")
        (info / "entry_points.txt").write_text(f"[vismem]\n{name} = vm_{name}\n")
    path = os.pathsep.join([str(place), os.environ.get("PYTHONPATH", "")])
    return {key: own for key, own in os.environ.items() if key != "VISMEM_PLUGINS"} | {"PYTHONPATH": path}


def vismem(environment: dict[str, str], *args: str) -> str:
    command = [sys.executable, "-m", "vismem_cli", *args]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def backbones(environment: dict[str, str]) -> list[str]:
    return [row["name"] for row in json.loads(vismem(environment, "backbones", "--json"))["backbones"]]


def test_the_program_and_the_other_backbones_stand(environment: dict[str, str]) -> None:
    assert vismem(environment, "--version").startswith("vismem ")
    assert {"qwen2_5_vl", "internvl", "llava", "generic", "sound"} <= set(backbones(environment))


def test_each_is_named_with_its_reason(environment: dict[str, str]) -> None:
    told = {row["name"]: row for row in json.loads(vismem(environment, "plugins", "--json"))["plugins"]}
    assert told["sound"]["ok"]
    for name, (_, why) in BROKEN.items():
        assert not told[name]["ok"] and why in told[name]["error"], name
        assert (told[name]["distribution"], told[name]["version"]) == (f"vm_{name}", "2.0")


def test_the_variable_restricts_what_is_loaded(environment: dict[str, str]) -> None:
    assert backbones(environment | {"VISMEM_PLUGINS": "sound"}) == ["sound"]
    assert backbones(environment | {"VISMEM_PLUGINS": ""}) == []
    told = json.loads(vismem(environment | {"VISMEM_PLUGINS": "sound, backbones"}, "plugins", "--json"))["plugins"]
    assert [row["name"] for row in told] == ["backbones", "sound"]
