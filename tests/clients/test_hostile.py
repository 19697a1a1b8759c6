"""Hostile rows, images and archives: the first hundred that ``by_hand/hostile_rows.py`` makes."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "by_hand" / "hostile_rows.py"


def test_hostile_rows() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--cases", "100"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "100 cases, 0 went wrong" in done.stdout
