"""The example package, installed by pip into an environment of its own: found, listed, trained, asked, conforming."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "examples" / "vismem-smolvlm"
STEPS = "train.formation.steps=2 train.invocation.steps=2 train.eval_samples=2 train.max_new_tokens=4"
SMALL = "train.formation.batch=2 train.invocation.batch=2 memory.short.length=2 memory.long.length=2"
Run = Callable[..., str]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs the Python of a fresh environment that sees this one's packages, and into which the example went by pip."""
    for needed in ("hatchling", "pip"):
        pytest.importorskip(needed, reason=f"nothing is fetched to install the example, so {needed} must be here")
    place = tmp_path_factory.mktemp("clean")
    venv.create(place, with_pip=False)
    own = Path(sysconfig.get_path("purelib", "venv", {"base": str(place)}))
    inherited = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (own / "inherited.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in inherited))
    program = Path(sysconfig.get_path("scripts", "venv", {"base": str(place)})) / "python"

    def run(*args: object) -> str:
        command = [str(program), *map(str, args)]
        done = subprocess.run(
            command, cwd=place, env=os.environ | {"COLUMNS": "200"}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
        return done.stdout

    assert "smolvlm" not in run("-m", "vismem_cli", "plugins")
    run("-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", PACKAGE)
    assert list(own.glob("vismem_smolvlm-*.dist-info/entry_points.txt"))
    return run


def test_it_is_listed_with_its_distribution(python: Run) -> None:
    rows = {row["name"]: row for row in json.loads(python("-m", "vismem_cli", "backbones", "--json"))["backbones"]}
    own = rows["smolvlm"]
    assert (own["distribution"], own["version"], own["embedded"]) == ("vismem-smolvlm", "0.1.0", True)
    assert own["facts"]["model_types"] == ["idefics3", "smolvlm"]
    assert "vismem-smolvlm 0.1.0" in python("-m", "vismem_cli", "backbones")


@pytest.mark.long
def test_it_trains_and_answers_without_naming_a_model(python: Run, tmp_path: Path) -> None:
    settings = [part for one in f"{STEPS} {SMALL}".split() for part in ("--set", one)]
    place = tmp_path / "run"
    told = python("-m", "vismem_cli", "train", "--backbone", "smolvlm", "--json", "--output", place, *settings)
    assert set(json.loads(told)["heldout"]) >= {"base", "memory"}
    ask = ["--image", PACKAGE.parents[1] / "plugins/vismem_plugins/samples/mosaic.png", "--prompt", "what is it ?"]
    told = python("-m", "vismem_cli", "infer", "--memory", place, *ask, "--trigger", "schedule:0=long,2=short",
                  "--max-new-tokens", 16, "--json")  # fmt: skip
    assert [own["kind"] for own in json.loads(told)["invocations"]][:1] == ["long"]


@pytest.mark.long
def test_it_keeps_the_promises(python: Run) -> None:
    told = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", PACKAGE / "pyproject.toml", PACKAGE / "tests")
    assert "passed" in told and "failed" not in told
