"""The walkthrough's commands run one after the other, against a hub on this machine; training is only made shorter."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hub import hub

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "walkthrough.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line.replace(".steps=20", ".steps=2"))
    for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]


@pytest.mark.long
def test_the_whole_road(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    said: dict[str, str] = {}
    with hub() as place:
        keep = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        settings = {"HF_ENDPOINT": place.address, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "hf_ours"}
        settings |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        for words in COMMANDS:
            program = [sys.executable, "-m", "vismem_cli"] if words[0] == "vismem" else [sys.executable]
            ran = subprocess.run(
                [*program, *words[1:]], cwd=tmp_path, env=keep | settings, capture_output=True, text=True, check=False
            )
            assert ran.returncode == 0, f"{shlex.join(words)}\n{ran.stderr[-2000:]}"
            said[words[1]] = ran.stdout + ran.stderr
        assert "user/mosaics" in place.repos
    assert list(said) == ["examples/llava_mosaics.py", "data", "train", "eval", "push", "infer"]
    assert "200" in said["data"] and "published" in said["push"]
    report = json.loads((tmp_path / "runs" / "mosaics" / "report.json").read_text(encoding="utf-8"))
    assert report["samples"] == 40
    assert "prompt  what is below row 1 column 1 ?" in said["infer"] and "memory  " in said["infer"]
