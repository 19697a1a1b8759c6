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


def run(*options: str, code: int = 0) -> str:
    program, threads = typer.Typer(), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        program.command()(runpy.run_path(str(SCRIPT))["main"])
    sizes = [part for size in TINY for part in ("--set", size)]
    done = CliRunner().invoke(program, [*sizes, "--tokens", "24", *options])
    torch.set_num_threads(threads)
    assert done.exit_code == code, done.output
    return done.output if code else done.stdout


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return json.loads(run("--batch", "3", "--repeats", "1", "--json"))  # type: ignore[no-any-return]


def test_every_figure_names_its_baseline(report: dict[str, Any]) -> None:
    assert {figure["over"] for figure in report["figures"]} == {
        "plain generate",
        "plain decode step",
        "plain batch",
        "plain generate of 16 rows",
    }
    assert all(0 < figure["least"] <= figure["ratio"] <= figure["most"] for figure in report["figures"])


def test_figures_by_context() -> None:
    options = ("--only", "ef", "--contexts", "36,81", "--batches", "1,3", "--repeats", "2", "--json")
    figures = {own["figure"]: own for own in json.loads(run(*options))["figures"]}
    assert len(figures) == 12
    for visual, rows in ((36, 1), (81, 3)):
        never, mixed = (
            figures[f"{visual} visual tokens, batch {rows}: {name}"] for name in ("never invoking", "mixed")
        )
        assert (never["invocations"], mixed["invocations"]) == (0, 4 * rows)
        shares = [mixed["parts"][name] for name in ("model", "query", "formation", "choice", "rest")]
        assert min(shares) > 0 and sum(shares) == pytest.approx(1)
        assert never["parts"]["query"] == 0
        assert figures[f"{visual} visual tokens: images dropped"]["over"] == "plain step without images"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--only az", "no z"),
        ("--only e --contexts abc", "not 'abc'"),
        ("--shape 80x", "one of 80m"),
        ("--dtype float31", "one of float32"),
        ("--suite gpu --output /proc/nowhere/x.json", "/proc/nowhere/x.json"),
    ],
)
def test_wrong_options_are_told_before_anything_is_measured(options: str, told: str) -> None:
    assert told in run(*options.split(), code=2)


@pytest.mark.long
def test_what_one_gpu_can_tell(tmp_path: Path) -> None:
    output = tmp_path / "measured" / "here.json"
    told = run("--suite", "gpu", "--batches", "1,2", "--visual", "36", "--output", str(output))
    report = json.loads(output.read_text(encoding="utf-8"))
    assert json.loads(told) == report and report["left_out"] == []
    lines = {own["what"]: own for own in report["lines"]}
    assert len(lines) == 2 * 2 * 3 + 2
    for rows in (1, 2):
        for mode in ("eager", "compiled"):
            assert lines[f"batch {rows}, {mode}: plain"]["ratio"] == 1
            assert lines[f"batch {rows}, {mode}: mixed"]["invocations"] == 2 * rows
    assert lines["a step of InvocationGrpo, group of 16"]["ratio"] > 0
    brief = json.loads(run("--suite", "gpu", "--batches", "1", "--minutes", "0"))
    assert brief["lines"] == [] and len(brief["left_out"]) == 4


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
        assert set(figure["parts"]) == {"query", "formation", "insertion"}
        assert sum(figure["parts"].values()) == pytest.approx(figure["ratio"])
