"""The scripts that measure a step of GRPO run and say what they should; their figures are nobody's promise."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def told(name: str, *options: str) -> dict[str, Any]:
    command = [sys.executable, str(EXAMPLES / name), *options, "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    report: dict[str, Any] = json.loads(ran.stdout)
    return report


@pytest.mark.long
def test_balance_is_measured_over_all_ranks() -> None:
    report = told("measure_balance.py", "--ranks", "2", "--batch", "1", "--steps", "1", "--group", "4")
    for stage in report["stages"]:
        before, after = stage["deals"].values()
        tokens = [own["replay tokens"]["mean"] for own in (before, after)]
        assert tokens[0] == tokens[1] > 0  # the same trajectories
        assert after["replay tokens"]["ratio"] <= before["replay tokens"]["ratio"]
        assert after["rollout passes"]["most"] >= stage["longest"] - 2  # the first token needs none, nor the last


@pytest.mark.long
def test_a_step_falls_apart_into_kernels_and_the_host() -> None:
    report = told("profile_step.py", "--prompts", "1", "--group", "3", "--tokens", "8", "--repeats", "1")
    assert [own["phase"] for own in report["phases"]] == ["reading", "rollout", "replay", "rest", "step"]
    *parts, whole = report["phases"]
    for name in ("seconds", "passes", "launches", "kernels"):
        assert sum(own[name] for own in parts) == pytest.approx(whole[name])
    assert whole["host"] > 0 and whole["launches_a_pass"] > 100
