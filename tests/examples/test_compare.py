"""Runs side by side: means over question types, and a plot of what the steps logged."""

import json
import runpy
from pathlib import Path

import typer
from typer.testing import CliRunner

SCRIPT = Path(__file__).parents[2] / "examples" / "compare.py"
CONDITIONS = ("base", "memory", "noise", "blind_base", "blind", "short", "long")


def finished(path: Path, share: float) -> Path:
    """What a run leaves behind, with accuracies that tell conditions and types apart."""
    path.mkdir()
    tables = {
        group: {name: {kind: share + 0.01 * at + 0.1 * last for last, kind in enumerate(kinds)}
                for at, name in enumerate(CONDITIONS)}
        for group, kinds in (("heldout", ("right", "most")), ("seen", ("read",)))
    }  # fmt: skip
    asked = {
        "right": {"short": 0.5, "long": 0.25},
        "most": {"short": 0.0, "long": 0.25},
        "read": {"short": 0, "long": 0},
    }
    (path / "report.json").write_text(json.dumps({**tables, "invocations": asked}))
    rows = [{"stage": "formation", "step": step, "loss": 1 / (1 + step)} for step in range(30)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_table_and_a_plot(tmp_path: Path) -> None:
    program, plot = typer.Typer(), tmp_path / "curves.png"
    program.command()(runpy.run_path(str(SCRIPT))["main"])
    runs = [str(finished(tmp_path / name, share)) for name, share in (("a", 0.1), ("b", 0.4))]
    done = CliRunner().invoke(program, [*runs, "--plot", str(plot)], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    lines = [line.replace("│", " ").split() for line in done.stdout.splitlines() if line.startswith("│")]
    assert lines[0] == ["a", "new", "0.150", "0.160", "0.170", "0.180", "0.190", "0.200", "0.210", "0.500"]
    assert lines[3] == ["b", "seen", "0.400", "0.410", "0.420", "0.430", "0.440", "0.450", "0.460", "0.000"]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_directory_without_a_report_is_one_line(tmp_path: Path) -> None:
    program = typer.Typer()
    program.command()(runpy.run_path(str(SCRIPT))["main"])
    done = CliRunner().invoke(program, [str(tmp_path)], env={"COLUMNS": "300"})
    assert (done.exit_code, done.stdout) == (2, "")
    assert "report.json: No such file or directory; give directories that `vismem train` finished" in done.stderr
