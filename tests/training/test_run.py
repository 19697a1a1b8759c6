"""A run: what it writes, that it refuses to overwrite, and that a killed one resumes to the same numbers."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import GRPO, run
from safetensors.torch import load_file

from vismem_core.errors import ConfigError, TrainingError
from vismem_core.training import loop as loops


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "whole"
    run(output)
    return output


@pytest.fixture(scope="module")
def finished_grpo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "whole"
    run(output, GRPO)
    return output


def test_a_run_writes_memory_metrics_and_report(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    reports = {"metrics.jsonl", "config.json", "run.json", "report.json", "README.md"}
    assert names == {"memory.safetensors", "vismem.json", *reports}
    assert "Measured on held-out questions" in (finished / "README.md").read_text()
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in rows] == [
        *(("formation", step) for step in range(1, 5)),
        *(("invocation", step) for step in range(1, 4)),
    ]
    report = json.loads((finished / "report.json").read_text())
    assert set(report["heldout"]) == {"base", "memory", "noise", "blind", "short", "long", "blind_base"}
    assert set(report["heldout"]["base"]) == {"shape"} and set(report["seen"]["memory"]) == {"colour"}
    assert report["seconds"] > 0 and report["invocations_per_answer"] >= 0


def test_grpo_logs_what_it_did_and_changes_no_base(finished_grpo: Path) -> None:
    rows = [json.loads(line) for line in (finished_grpo / "metrics.jsonl").read_text().splitlines()]
    stages = [row["stage"] for row in rows]
    assert stages == ["formation_grpo"] * 4 + ["invocation_grpo"] * 3
    shared = {"reward", "gain", "loss", "kl", "beta", "clipped", "entropy", "silent", "short", "long", "tokens", "norm"}
    assert all(shared <= row.keys() for row in rows)
    assert {"p_type", "p_neg"} <= rows[-1].keys()
    assert rows[0]["kl"] == 0 and any(row["kl"] > 0 for row in rows[1:4])


def test_steps_without_a_finite_gradient_are_skipped_and_ten_of_them_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vismem_core.training.formation import Formation

    accumulate, bad = Formation.accumulate, {1}

    def sometimes(self: Formation, batch: Any, key: str, progress: float) -> dict[str, float]:
        figures = accumulate(self, batch, key, progress)
        if int(key.rpartition("/")[2]) in bad:
            self.parameters()[0][1].grad[...] = float("nan")  # type: ignore[index]
        return figures

    monkeypatch.setattr(Formation, "accumulate", sometimes)
    run(tmp_path / "once")
    rows = [json.loads(line) for line in (tmp_path / "once" / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in rows[:4]] == [False, True, False, False]
    memory = load_file(tmp_path / "once" / "memory.safetensors")
    assert all(own.isfinite().all() for own in memory.values())
    bad.update(range(20))
    with pytest.raises(TrainingError, match="10 steps in a row"):
        run(tmp_path / "always", ["train.formation.steps=12"])


def test_a_directory_with_a_run_is_refused_and_a_finished_one_gives_its_report(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(TrainingError, match="--resume"):
        run(finished)
    assert run(finished, resume=True) == json.loads((finished / "report.json").read_text())
    assert "nothing was left to do" in capsys.readouterr().err
    with pytest.raises(TrainingError, match=r"formation\.lr is .* there and 0\.002 here; give the same settings"):
        run(finished, ["train.formation.lr=2e-3"], resume=True)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(TrainingError, match="not empty"):
        run(tmp_path)
    with pytest.raises(ConfigError, match="expected one of sft, grpo"):
        run(tmp_path / "new", ["train.objective=best"])


@pytest.mark.long
def test_runs_that_are_ended_at_random_moments_come_to_the_same_end() -> None:
    """Ten of them here; more by hand."""
    script = Path(__file__).with_name("survive.py")
    done = subprocess.run(
        [sys.executable, str(script), "--times", "10"], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("the same\n") == 10 and "every run came to the same end" in done.stdout
    ended = sum(int(count) for count in re.findall(r", ended: (\d+)", done.stdout))
    assert ended >= 4, f"{ended} of ten runs were ended before their own end"


@pytest.mark.parametrize(("calls", "where"), [(3, "formation, step 3"), (4, "the end of formation")])
def test_an_interrupted_run_keeps_its_step(
    calls: int, where: str, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update, before, left = loops.Loop._gradients, signal.getsignal(signal.SIGINT), iter(range(calls - 1))

    def interrupting(*args: Any) -> float:
        if next(left, None) is None:
            signal.raise_signal(signal.SIGINT)
        return update(*args)

    monkeypatch.setattr(loops.Loop, "_gradients", interrupting)
    with pytest.raises(TrainingError, match=rf"interrupted after {where}.*--resume"):
        run(tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.setattr(loops.Loop, "_gradients", update)
    drawn = len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert drawn == calls
    run(tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == (finished / "metrics.jsonl").read_text()
    ours, whole = (load_file(folder / "memory.safetensors") for folder in (tmp_path / "run", finished))
    assert all(torch.equal(ours[name], whole[name]) for name in whole)


def test_a_full_disk_leaves_the_last_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vismem_core.training import state

    written = state.Saver.write
    calls = []

    def full(saver: state.Saver) -> str | None:
        calls.append(saver)
        if len(calls) >= 2:
            raise OSError(28, "No space left on device", str(tmp_path))
        return written(saver)

    monkeypatch.setattr(state.Saver, "write", full)
    with pytest.raises(OSError, match="No space"):
        run(tmp_path / "run")
    monkeypatch.setattr(state.Saver, "write", written)
    assert run(tmp_path / "run", resume=True)["samples"] == 4
