"""Held-out evaluation while a run trains: what it measures, what it keeps, when it ends a stage, how it resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from runs import GRPO, run
from safetensors.torch import load_file
from tiny import qwen

import vismem_core as vismem
from vismem_core.answers.metric import Metric
from vismem_core.errors import TrainingError
from vismem_core.training import loop as loops
from vismem_core.training.folder import settings
from vismem_core.training.heldout import Heldout

FIGURES = Heldout._figures
EVERY = ["train.evaluation={every: 2, samples: 2, shown: 2}", "train.metric=f1"]


def table(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def evaluations(output: Path) -> list[dict[str, Any]]:
    return [row for row in table(output / "metrics.jsonl") if "finished" in row]


def scripted(monkeypatch: pytest.MonkeyPatch, *values: float) -> None:
    """Evaluations come to these, one after the other, whatever is answered; the closing report is left alone."""
    left = iter(values)

    def told(self: Heldout, answers: Any) -> dict[str, float]:
        return FIGURES(self, answers) | {"eval_f1": next(left)}

    monkeypatch.setattr(Heldout, "_figures", told)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "whole"
    run(output, EVERY)
    return output


def test_rows_and_answers_are_written_as_training_goes(whole: Path) -> None:
    rows = evaluations(whole)
    places = [(row["stage"], row["step"], row["finished"]) for row in rows]
    assert places == [
        ("formation", 2, False),
        ("formation", 4, True),
        ("invocation", 2, False),
        ("invocation", 3, True),
    ]
    assert rows[0]["eval_f1"] == pytest.approx((rows[0]["eval_f1_short"] + rows[0]["eval_f1_long"]) / 2, abs=1e-6)
    assert {"eval_f1", "eval_invocations"} <= rows[-1].keys() and "eval_f1_short" not in rows[-1]
    told = table(whole / "samples.jsonl")
    assert [(own["stage"], own["step"], own["way"], own["id"]) for own in told[:4]] == [
        ("formation", 2, way, name) for way in ("short", "long") for name in ("0", "1")
    ]
    assert len(told) == 2 * 4 + 2 * 2
    assert told[0]["marked"].startswith("‹short›") and told[0]["invocations"] == [{"kind": "short", "position": 0}]
    assert {own["type"] for own in told} == {"colour", "shape"}
    assert told[0]["references"] == ["a bag , a boot ."]


def test_the_last_evaluation_agrees_with_the_closing_report(whole: Path) -> None:
    report = json.loads((whole / "report.json").read_text())
    ways = report["heldout"]["memory"] | report["seen"]["memory"]
    assert evaluations(whole)[-1]["eval_f1"] == pytest.approx(sum(ways.values()) / 2, abs=1e-6)
    assert report["metric"] == "f1" and report["steps"] == {"formation": 4, "invocation": 3}
    best = max(evaluations(whole)[2:], key=lambda row: row["eval_f1"])
    assert report["best"] == {"folder": "best", **best}
    assert [path.name for path in whole.iterdir() if path.is_dir()] == ["best"]


def test_the_best_is_a_memory_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, 0.1, 0.4, 0.3, 0.2)
    report = run(tmp_path / "run", EVERY)
    assert (report["best"]["stage"], report["best"]["step"], report["best"]["eval_f1"]) == ("invocation", 2, 0.3)
    best = json.loads((tmp_path / "run" / "best" / "vismem.json").read_text())
    assert best["evaluated"] | {"folder": "best"} == report["best"]
    kept = load_file(tmp_path / "run" / "best" / "memory.safetensors")
    last = load_file(tmp_path / "run" / "memory.safetensors")
    assert {name for name in last if not last[name].equal(kept[name])} == {"tokens.head"}
    trained = vismem.attach(*qwen(), tmp_path / "run" / "best").trained()
    assert all(trained[name].equal(kept[name]) for name in kept)


@pytest.mark.long
@pytest.mark.parametrize("extra", [[], GRPO], ids=["sft", "grpo"])
def test_what_is_kept_may_be_the_best(extra: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, 0.4, 0.1, 0.3, 0.2)
    run(tmp_path / "run", [*extra, *EVERY, "train.evaluation.keep=best"])
    result, best = (load_file(place / "memory.safetensors") for place in (tmp_path / "run", tmp_path / "run" / "best"))
    assert result.keys() == best.keys() and all(result[name].equal(best[name]) for name in best)
    scripted(monkeypatch, 0.1, 0.4, 0.2, 0.3)
    run(tmp_path / "last", [*extra, *EVERY, "train.evaluation.keep=best"])
    last = load_file(tmp_path / "last" / "memory.safetensors")
    assert not all(last[name].equal(best[name]) for name in best)


def test_a_stage_ends_where_nothing_improves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [*EVERY, "train.evaluation={every: 1, patience: 2, min_delta: 0.05, samples: 1}"]
    scripted(monkeypatch, 0.3, 0.34, 0.38, 0.1, 0.5, 0.6, 0.7)  # .38 is over .34 by less than .05
    report = run(tmp_path / "run", ["train.formation.steps=9", *settings])
    assert report["steps"] == {"formation": 3, "invocation": 3}
    rows = [row["step"] for row in table(tmp_path / "run" / "metrics.jsonl") if row["stage"] == "formation"]
    assert rows == [1, 1, 2, 2, 3, 3, 3]  # steps, their evaluations, and that of the finished stage


def stopped(output: Path, monkeypatch: pytest.MonkeyPatch, place: str, calls: int, *words: str) -> None:
    """A run that an error ends when ``place`` is called so often."""
    owner, _, name = place.partition(".")
    cls: Any = {"Loop": loops.Loop, "Heldout": Heldout}[owner]
    own, left = getattr(cls, name), iter(range(calls - 1))

    def failing(*args: Any, **named: Any) -> Any:
        if next(left, None) is None:
            raise RuntimeError("the power is out")
        return own(*args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(cls, name, failing)
        with pytest.raises(RuntimeError, match="the power is out"):
            run(output, [*EVERY, *words])


def same(ours: Path, whole: Path) -> None:
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (ours / name).read_text() == (whole / name).read_text(), name
    for name in ("memory.safetensors", "best/memory.safetensors"):
        got, expected = (load_file(place / name) for place in (ours, whole))
        assert all(got[key].equal(expected[key]) for key in expected), name
    reports = [
        json.loads((place / "report.json").read_text()) | {"seconds": 0, "data_wait": 0} for place in (ours, whole)
    ]
    assert reports[0] == reports[1]


@pytest.mark.parametrize(
    ("place", "calls"),
    [
        ("Heldout.ask", 1),  # the step is saved, its evaluation is not: that comes first when the run goes on
        pytest.param("Loop._gradients", 4, marks=pytest.mark.long),
        pytest.param("Heldout.ask", 2, marks=pytest.mark.long),
        pytest.param("Heldout.ask", 3, marks=pytest.mark.long),
        pytest.param("Heldout.ask", 4, marks=pytest.mark.long),
        pytest.param("Loop._gradients", 7, marks=pytest.mark.long),
    ],
)
def test_an_interrupted_run_comes_to_the_same_end(
    place: str, calls: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(tmp_path / "run", monkeypatch, place, calls)
    run(tmp_path / "run", EVERY, resume=True)
    same(tmp_path / "run", whole)


@pytest.mark.long
def test_a_metric_that_fails_ends_the_run_after_its_step_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    over, left = Metric.over, iter(range(14))  # the rehearsed report asks for seven ways of two types

    def failing(self: Metric, *args: Any) -> float:
        if next(left, None) is None:
            raise TrainingError("away")
        return over(self, *args)

    monkeypatch.setattr(Metric, "over", failing)
    with pytest.raises(TrainingError, match="away"):
        run(tmp_path / "run", EVERY)
    assert (tmp_path / "run" / "state.safetensors").exists() and settings(tmp_path / "run")
    assert len(table(tmp_path / "run" / "metrics.jsonl")) == 2
