"""Runs devices.py, where torch has one more device, in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "part",
    ["mix or refused", *(pytest.param(own, marks=pytest.mark.long) for own in ("answers", "steps"))],
)
def test_on_other_devices(part: str) -> None:
    cases = Path(__file__).with_name("devices.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "--tb=short", str(cases), "-k", part],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
