"""Published memory, by huggingface_hub itself, against a hub on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import warm
from hub import Hub, hub
from huggingface_hub import ModelCard

from vismem_plugins.mini import path

PROGRAM = """
import json, sys
import vismem_core as vismem
from vismem_core.base.loading import load_base
from vismem_core.errors import VismemError

def attached(source, **options):
    model, processor, _ = load_base("qwen2_5_vl")
    memory = vismem.attach(model, processor, source, **options)
    tensors = {name: own.double().sum().item() for name, own in memory.trained().items()}
    memory.detach()
    return tensors

"""
SHIPPED = path("qwen2_5_vl") / "memory"


@pytest.fixture(scope="module")
def place() -> Iterator[Hub]:
    with hub() as own:
        yield own


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def run(place: Hub, home: Path) -> Iterator[warm.Run]:
    """huggingface_hub reads its settings when it is imported: not in this process, then."""
    with warm.commands(place.settings(home)) as own:
        yield own


def told(run: warm.Run, place: Path, lines: str) -> Any:
    done = run(["python", "-c", PROGRAM + lines], place)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.long
def test_there_and_back(place: Hub, run: warm.Run, home: Path, tmp_path: Path) -> None:
    done = run(["vismem", "push", str(SHIPPED), "me/there", "--license", "apache-2.0", "--json"], tmp_path)
    assert done.returncode == 0, done.stderr
    repo = place.repos["me/there"]
    files = repo.commits[repo.branches["main"]]
    assert json.loads(done.stdout)["commit"].endswith(repo.branches["main"]) and not repo.private
    assert {"memory.safetensors", "vismem.json", "README.md"} <= files.keys()
    assert files["memory.safetensors"] == (SHIPPED / "memory.safetensors").read_bytes()
    lines = f"print(json.dumps([attached('me/there'), attached({str(SHIPPED)!r})]))"
    there, here = told(run, tmp_path, lines)
    assert there == here
    asked = len(place.asked)
    offline = place.settings(home) | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM + lines], env=offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    there, here = json.loads(done.stdout.splitlines()[-1])  # from the cache
    assert there == here and len(place.asked) == asked


@pytest.mark.long
def test_revisions(place: Hub, run: warm.Run, tmp_path: Path) -> None:
    lines = """
from vismem_core.config import MemoryConfig
model, processor, _ = load_base("qwen2_5_vl")
memory = vismem.attach(model, processor, seed=1)
memory.push_to_hub("me/two", private=True, message="first")
memory.detach()
memory = vismem.attach(model, processor, seed=2)
memory.push_to_hub("me/two", revision="second")
told = {name: own.double().sum().item() for name, own in memory.trained().items()}
memory.detach()
print(json.dumps([told, attached("me/two"), attached("me/two@second"), attached("me/two", revision="second")]))
"""
    trained, main, second, named = told(run, tmp_path, lines)
    assert trained == second == named != main
    repo = place.repos["me/two"]
    assert repo.private and repo.messages == ["first", "Memory trained with vismem"] and len(repo.branches) == 2
    first = repo.branches["main"]
    assert told(run, tmp_path, f"print(json.dumps(attached('me/two@{first}')))") == main


@pytest.mark.long
def test_a_card_keeps_what_people_wrote(place: Hub, run: warm.Run, tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    folder.mkdir()
    for name in ("memory.safetensors", "vismem.json"):
        (folder / name).write_bytes((SHIPPED / name).read_bytes())
    about = json.loads((folder / "vismem.json").read_text())
    about["base"]["name"] = "Qwen/Qwen2.5-VL-3B-Instruct"
    (folder / "vismem.json").write_text(json.dumps(about))
    report = {"heldout": {"base": {"right": 0.25, "below": 0.75}, "memory": {"right": 0.5, "below": None}}}
    (folder / "report.json").write_text(json.dumps(report))
    assert run(["vismem", "push", str(folder), "me/card"], tmp_path).returncode == 0

    def card() -> ModelCard:
        repo = place.repos["me/card"]
        return ModelCard(repo.commits[repo.branches["main"]]["README.md"].decode())

    first = card()
    assert first.data.library_name == "vismem" and first.data.base_model == "Qwen/Qwen2.5-VL-3B-Instruct"
    assert first.data.pipeline_tag == "image-text-to-text" and {"vismem", "qwen2_5_vl"} <= set(first.data.tags)
    assert 'vismem.attach(model, processor, "me/card")' in first.text
    assert "| right | 0.250 | 0.500 |" in first.text and "| below | 0.750 |  |" in first.text
    assert about["base"]["fingerprint"] in first.text
    repo = place.repos["me/card"]
    mine = (
        str(first)
        .replace("# card\n", "# Ours\n\nRead this.\n")
        .replace("pipeline_tag: image-text-to-text", "license: mit")
    )
    repo.commits[repo.branches["main"]]["README.md"] = f"{mine}\nAnd the end.\n".encode()
    report["heldout"]["memory"]["right"] = 0.625
    (folder / "report.json").write_text(json.dumps(report))
    assert run(["vismem", "push", str(folder), "me/card", "--license", "apache-2.0"], tmp_path).returncode == 0
    second = card()
    assert second.data.license == "mit" and second.data.pipeline_tag == "image-text-to-text"
    assert second.text.index("Read this.") < second.text.index("| 0.625 |") < second.text.index("And the end.")
    assert "| right | 0.250 | 0.500 |" not in second.text and second.text.count("vismem.attach") == 1


@pytest.mark.long
@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("push", "nowhere", "me/x"), "nowhere: holds no memory"),
        (("push", str(SHIPPED), "a/b/c"), "a/b/c: not published"),
        (("eval", "--memory", "me/nothing"), "me/nothing: no such folder here, and no memory on the hub"),
        (("eval", "--memory", "me/there@gone"), "me/there@gone: no such folder here, and no memory on the hub"),
    ],
)
def test_what_is_wrong_is_one_line(run: warm.Run, tmp_path: Path, args: tuple[str, ...], says: str) -> None:
    done = run(["vismem", *args], tmp_path)
    assert done.returncode == 1
    (line,) = [own for own in done.stderr.splitlines() if own.startswith("error: ")]
    assert says in line and "Traceback" not in done.stderr


@pytest.mark.long
def test_strangers_are_turned_away(place: Hub, run: warm.Run, tmp_path: Path) -> None:
    place.token = "hf_another"
    try:
        done = run(["vismem", "push", str(SHIPPED), "me/private"], tmp_path)
        assert done.returncode == 1 and "me/private: not published: " in done.stderr and "me/private" not in place.repos
        done = run(["vismem", "push", str(SHIPPED), "me/private"], tmp_path, HF_TOKEN="")
        assert done.returncode == 1 and "hf auth login" in done.stderr
    finally:
        place.token = ""
