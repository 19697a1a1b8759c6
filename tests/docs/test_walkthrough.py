"""The walkthrough's commands run one after the other, against a hub on this machine; training is only made shorter."""

from __future__ import annotations

import json
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
import warm
from hub import hub

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "walkthrough.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line.replace(".steps=20", ".steps=2"))
    for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]


SERVERS = {"serve": ("8000", "/health"), "demo": ("7860", "/")}
"""Commands that stay: the port that the page has, and what answers once they are there."""
(ASKING,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.long
def test_the_whole_road(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    said: dict[str, str] = {}
    with hub() as place:
        settings = place.settings(tmp_path / "hf")
        with warm.commands(settings) as start:

            def run(*words: str) -> str:
                ran = start(words, tmp_path)
                assert ran.returncode == 0, f"{shlex.join(words)}\n{ran.stderr[-2000:]}"
                return ran.stdout + ran.stderr

            for words in COMMANDS:
                if words[1] not in SERVERS:
                    said[words[1]] = run(*words)
                    continue
                with serving(words, tmp_path, settings) as port:
                    if words[1] == "serve":
                        said["serve"] = run("python", "-c", ASKING.replace("8000", port))
        assert "user/mosaics" in place.repos
    assert list(said) == ["examples/llava_mosaics.py", "data", "train", "eval", "push", "infer", "serve"]
    assert "200" in said["data"] and "published" in said["push"]
    report = json.loads((tmp_path / "runs" / "mosaics" / "report.json").read_text(encoding="utf-8"))
    assert report["samples"] == 40
    assert "prompt  what is below row 1 column 1 ?" in said["infer"] and "memory  " in said["infer"]
    answers = said["serve"].splitlines()
    assert len(answers) == 3 and all(re.fullmatch(r"\w.* \[.*\]", own) for own in answers)
    assert answers[0].rpartition(" [")[0] in said["infer"].splitlines()


@contextmanager
def serving(words: list[str], place: Path, settings: dict[str, str]) -> Iterator[str]:
    """The command while it answers, at a port that is free; it ends well when it is asked to."""
    usual, path = SERVERS[words[1]]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    asked = [own for own in words[1:] if own not in ("--port", usual)] + ["--port", port]
    with subprocess.Popen([sys.executable, "-m", "vismem_cli", *asked], cwd=place, env=settings) as running:
        try:
            for _ in range(600):
                with suppress(httpx.TransportError):
                    if httpx.get(f"http://127.0.0.1:{port}{path}").status_code == 200:
                        break
                assert running.poll() is None, f"{shlex.join(words)} ended with {running.returncode}"
                time.sleep(0.1)
            yield port
        finally:
            running.send_signal(signal.SIGTERM)
    assert words[1] != "serve" or running.returncode == 0
