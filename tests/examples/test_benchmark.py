"""The benchmark runs, measures what it says, and invokes what it schedules; its figures are nobody's promise."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmark.py"
TINY = ["text.num_hidden_layers=2", "text.hidden_size=32", "text.intermediate_size=32", "text.num_attention_heads=2"]
TINY += ["text.vocab_size=128", "vision.depth=2", "vision.hidden_size=32", "vision.intermediate_size=32"]


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    program, threads = typer.Typer(), torch.get_num_threads()
    program.command()(runpy.run_path(str(SCRIPT))["main"])
    sizes = [part for size in TINY for part in ("--set", size)]
    done = CliRunner().invoke(program, [*sizes, "--tokens", "24", "--batch", "3", "--repeats", "1", "--json"])
    torch.set_num_threads(threads)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def test_every_figure_names_its_baseline(report: dict[str, Any]) -> None:
    assert {figure["over"] for figure in report["figures"]} == {
        "plain generate",
        "plain decode step",
        "plain batch",
        "plain generate of 16 rows",
    }
    assert all(figure["ratio"] > 0 for figure in report["figures"])


def test_memory_is_invoked_as_scheduled(report: dict[str, Any]) -> None:
    invocations = {"idle": 0, "invocation": 4, "batch 3": 12}
    *figures, rolled, stepped = report["figures"]
    assert rolled["invocations"] >= 8 and stepped["parts"]["base (MB)"] > 0  # half of each group is dealt a kind
    for figure in figures:
        assert figure["invocations"] == invocations[figure["figure"].partition(":")[0]], figure["figure"]


def test_an_invocation_is_the_sum_of_its_parts(report: dict[str, Any]) -> None:
    split = [figure for figure in report["figures"] if figure["over"] == "plain decode step"]
    assert len(split) == 8
    for figure in split:
        assert set(figure["parts"]) == {"query", "formation", "insertion", "loop"}
        assert sum(figure["parts"].values()) == pytest.approx(figure["ratio"])
