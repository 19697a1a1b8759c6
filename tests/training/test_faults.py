"""What may happen to a run in several processes: it ends in time, says who is gone, and goes on where it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import pytest
import warm
from launch import environments

PART = Path(__file__).with_name("faults.py")
LIMIT = 60.0
"""Seconds within which all processes that can are gone."""


Two = Callable[..., list["Future[subprocess.CompletedProcess[str]]"]]


@pytest.fixture(scope="module")
def two() -> Iterator[Two]:
    """Begins a run in two processes."""
    (first, second), pool = environments(2), ThreadPoolExecutor(2)
    with warm.commands(os.environ | first) as one, warm.commands(os.environ | second) as other, pool:

        def begin(fault: str, folder: Path) -> list[Future[subprocess.CompletedProcess[str]]]:
            told = []
            for rank, (run, own) in enumerate(zip((one, other), environments(2), strict=True)):
                place = folder / str(rank)
                place.mkdir(parents=True, exist_ok=True)
                told.append(pool.submit(run, ["python", str(PART), fault, str(folder)], place, **own))
            return told

        yield begin


def ended(running: list[Future[subprocess.CompletedProcess[str]]]) -> list[tuple[int, str]]:
    """Exit code and last line of each process, all within the limit."""
    wait(running, LIMIT)
    told = [own.result(0) for own in running]
    assert not any("Traceback" in own.stderr for own in told), told
    return [(own.returncode, (own.stderr.strip().splitlines() or [""])[-1]) for own in told]


def rows(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()


@pytest.fixture(scope="module")
def unbroken(two: Two, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    assert [code for code, _ in ended(two("nothing", folder))] == [0, 0]
    return folder / "run"


@pytest.mark.long
@pytest.mark.parametrize(
    ("fault", "codes", "says"),
    [
        ("kill", [1, -signal.SIGKILL], "process 1 gives no sign of life"),
        ("stop", [1, -signal.SIGKILL], "process 1 gives no sign of life"),
        ("term", [128 + signal.SIGTERM] * 2, "interrupted after formation, step 2"),
        ("full", [1, 1], "No space left on device"),
    ],
)
def test_a_run_ends_and_goes_on(
    fault: str, codes: list[int], says: str, two: Two, unbroken: Path, tmp_path: Path
) -> None:
    running = two(fault, tmp_path)
    if fault == "stop":
        running[0].result(LIMIT)
        os.kill(int((tmp_path / "stopped").read_text()), signal.SIGKILL)
    told = ended(running)
    assert [code for code, _ in told] == codes
    assert all(says in line for code, line in told if code >= 0), told
    assert [code for code, _ in ended(two("nothing", tmp_path))] == [0, 0]
    assert rows(tmp_path / "run") == rows(unbroken)
    reports = [json.loads((folder / "report.json").read_text()) for folder in (tmp_path / "run", unbroken)]
    assert reports[0]["heldout"] == reports[1]["heldout"]


@pytest.mark.long
def test_whoever_loses_the_first_says_so(two: Two, tmp_path: Path) -> None:
    (first, _), (code, line) = ended(two("first", tmp_path))
    assert first == -signal.SIGKILL and code == 1 and "process 0 " in line


@pytest.mark.long
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("settings", "process 1 has train.seed 1, and process 0 0; give all processes the same settings"),
        ("elsewhere", "process 1 has the run's files in --output False"),
    ],
)
def test_what_differs_between_processes_is_told_at_once(fault: str, says: str, two: Two, tmp_path: Path) -> None:
    told = ended(two(fault, tmp_path))
    assert [code for code, _ in told] == [1, 1] and all(says in line for _, line in told), told


@pytest.mark.long
def test_a_folder_that_one_does_not_see_is_told_on_resume(two: Two, tmp_path: Path) -> None:
    ended(two("term", tmp_path))
    os.rename(tmp_path / "run", tmp_path / "run0")
    told = ended(two("lost", tmp_path))
    assert [code for code, _ in told] == [1, 1]
    assert all("process 1 has " in line and "disk that all machines share" in line for _, line in told), told
