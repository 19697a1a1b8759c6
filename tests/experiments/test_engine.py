"""Experiments from end to end on the embedded model, small enough to tell nothing but that they run as they should."""

import base64
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from vismem_cli.app import app
from vismem_core import attach
from vismem_core.answers.evaluation import evaluate
from vismem_core.base.loading import load_base
from vismem_core.config import load
from vismem_core.errors import TrainingError, VismemError
from vismem_core.experiments import cells, engine, page, rivals
from vismem_core.experiments.cells import Base
from vismem_core.experiments.recipe import Data, Recipe, Row, Trained, find
from vismem_core.experiments.recipe import names as recipe_names
from vismem_core.files.samples import open_dataset

BASE = Base("qwen2_5_vl")
FEW = {
    **{f"train.{stage}.{key}": 2 for stage in ("formation", "invocation") for key in ("steps", "batch")},
    **{f"train.grpo.{stage}.{key}": 2 for stage in ("formation", "invocation") for key in ("steps", "batch")},
    "train.grpo.max_new_tokens": 4,
    "train.grpo.group": 2,
}


def recipe(**changes: Any) -> Recipe:
    told: dict[str, Any] = {
        "name": "tiny",
        "title": "Tiny",
        "asks": "Does it run?",
        "data": Data("mosaic"),
        "seeds": [0, 1],
        "per_type": 2,
        "max_new_tokens": 8,
        "group": "new",
        "trained": {"memory": Trained("memory", settings=FEW), "lora": Trained("lora", "lora", settings=FEW)},
        "rows": {
            "base": Row("base"),
            "memory": Row("memory", of="memory", trigger="schedule:0=long"),
            "noise": Row("noise", of="memory", trigger="schedule:0=long", replaced="noise"),
            "lora": Row("lora", of="lora"),
        },
        "compare": [("memory", "base"), ("noise", "memory")],
    }
    return Recipe(**{**told, **changes})


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    place = tmp_path_factory.mktemp("experiment")
    (told,) = engine.run([recipe()], BASE, place / "cells", jobs=2)
    page.write([told], place)
    return place, told


@pytest.mark.parametrize(
    ("resumed", "expected"), [((False, False), 200.0), ((True, False), 300.0), ((True, True), 200.0)]
)
def test_what_was_interrupted_tells_no_cost(resumed: tuple[bool, bool], expected: float, tmp_path: Path) -> None:
    own = recipe()
    for seed, (cpu, again) in enumerate(zip((100.0, 300.0), resumed, strict=True)):
        training = engine.work.of(own, BASE, own.rows["memory"], seed).needs
        assert training is not None
        (tmp_path / training.key).mkdir()
        told = {"cpu": cpu, "parameters": 7, "resumed": again}
        (tmp_path / training.key / cells.RESULT).write_text(json.dumps(told))
    assert engine._costs(own, BASE, tmp_path, "memory") == {"parameters": 7, "training": expected}


def test_what_was_trained_is_trained_again_only_for_what_is_left(tmp_path: Path) -> None:
    own = recipe(seeds=[0])
    unlike = {cell.key: cell for cell in cells.cells(own, BASE)}
    for key in unlike:
        (tmp_path / key).mkdir()
        (tmp_path / key / cells.RESULT).write_text("{}")
    assert engine._left(unlike, tmp_path) == {}
    asked = cells.of(own, BASE, own.rows["noise"], 0)
    (tmp_path / asked.key / cells.RESULT).unlink()
    assert asked.needs is not None
    assert set(engine._left(unlike, tmp_path)) == {asked.key, asked.needs.key}
    (tmp_path / asked.needs.key / "memory").mkdir()
    (tmp_path / asked.needs.key / "memory" / "vismem.json").write_text("{}")
    assert set(engine._left(unlike, tmp_path)) == {asked.key}


@pytest.mark.parametrize(
    ("base", "changes", "told"),
    [
        (Base("qwen2_5_vl", train="nowhere.jsonl"), {}, "nowhere.jsonl"),
        (Base("qwen2_5_vl", model="nowhere"), {}, "nowhere"),
        (BASE, {"trained": {"memory": Trained("memory", settings={"train.formation.stps": 2})}}, "stps"),
    ],
)
def test_what_is_of_no_use_is_told_before_anything_is_done(
    base: Base, changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    rows = {"rows": {"memory": Row("memory", of="memory")}, "compare": []}
    with pytest.raises(VismemError, match=told):
        engine.run([recipe(**changes, **rows)], base, tmp_path / "cells")
    assert not (tmp_path / "cells").exists()


@pytest.mark.long
def test_rows_are_what_evaluate_finds(done: tuple[Path, dict[str, Any]]) -> None:
    place, told = done
    assert told["rows"]["base"]["accuracy"]["new"]["error"] == 0.0  # the base hangs on no seed
    for seed in (0, 1):
        trained = cells.of(recipe(), BASE, recipe().rows["memory"], seed).needs
        assert trained is not None
        model, processor, _ = load_base("qwen2_5_vl")
        memory = attach(model, processor, place / "cells" / trained.key / "memory")
        data = open_dataset("mosaic", "heldout")
        found = evaluate(memory, data, groups=data.groups, per_type=2, max_new_tokens=8)
        scores = told["rows"]["memory"]["scores"][seed]
        for group in ("heldout", "seen"):
            for kind, accuracy in found[group]["long"].items():
                assert fmean(map(float, scores[kind])) == accuracy, kind
    assert told["rows"]["memory"]["asks"]["right"] == 1.0
    assert told["rows"]["memory"]["parameters"] == sum(own.numel() for own in memory.trained().values())
    (first, *_) = told["compare"]
    assert first["mean"] == pytest.approx(
        fmean(told["rows"]["memory"]["accuracy"]["new"]["seeds"]) - told["rows"]["base"]["accuracy"]["new"]["mean"]
    )


@pytest.mark.long
def test_what_was_done_is_not_done_again(done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    place, told = done
    shutil.copytree(place / "cells", tmp_path / "cells")
    ask = cells.of(recipe(), BASE, recipe().rows["noise"], 1)
    (tmp_path / "cells" / ask.key / cells.RESULT).unlink()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").glob(f"*/{cells.RESULT}")}
    seen: list[tuple[str, int, int]] = []
    (again,) = engine.run([recipe()], BASE, tmp_path / "cells", jobs=1, progress=lambda *own: seen.append(own))
    assert [own[1:] for own in seen] == [(len(before), len(before) + 1), (len(before) + 1, len(before) + 1)]
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert again["rows"]["noise"]["scores"] == told["rows"]["noise"]["scores"]


@pytest.mark.long
def test_a_cell_that_fails_keeps_the_others(tmp_path: Path) -> None:
    broken = Trained("broken", settings={**FEW, "memory.short.name": "no such former"})
    rows = {"base": Row("base"), "broken": Row("broken", of="broken")}
    odd = recipe(seeds=[0], trained={"broken": broken}, rows=rows, compare=[])
    with pytest.raises(TrainingError, match=r"tiny: train broken, seed 0: unknown former 'no such former'.*1 more"):
        engine.run([odd], BASE, tmp_path, jobs=1)
    assert cells.result(cells.of(odd, BASE, rows["base"], 0), tmp_path) is not None


@pytest.mark.long
def test_a_run_that_is_killed_leaves_no_process_and_goes_on(tmp_path: Path) -> None:
    """Killed in the middle of a training that never ends by itself; what was done before stays done."""
    path = tmp_path / "mine.yaml"
    rows = "rows: {base: {}, memory: {of: memory}}\nseeds: [0]\nper_type: 1\n"
    path.write_text(f"title: T\nasks: A?\ndata: mosaic\ntrained: {{memory: {{}}}}\n{rows}", encoding="utf-8")
    command = [sys.executable, "-m", "vismem_cli", "experiment", str(path), "--output", str(tmp_path), "--jobs", "2"]
    running = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    told = engine.Cell(BASE, find(str(path)), (), find(str(path)).rows["base"], 0)

    def trains() -> bool:
        return any((tmp_path / "cells").glob("*/memory/metrics.jsonl"))

    assert _soon(lambda: trains() and cells.result(told, tmp_path / "cells") is not None, 120)
    workers = [child for child in psutil.Process(running.pid).children(recursive=True) if child.is_running()]
    assert len(workers) >= 2
    running.kill()
    running.wait()
    assert _soon(lambda: not any(child.is_running() and child.status() != "zombie" for child in workers), 20)
    left = [cell for cell in cells.cells(find(str(path)), BASE) if cells.result(cell, tmp_path / "cells") is None]
    assert [cell.title for cell in left] == ["train memory, seed 0", "ask memory, seed 0"]


def _soon(what: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end:
        time.sleep(0.2)
    return what()


@pytest.mark.parametrize("objective", ["sft", "grpo"])
def test_a_rival_learns_and_leaves_the_base_alone(tmp_path: Path, objective: str) -> None:
    model, processor, name = load_base("qwen2_5_vl")
    before = {key: own.clone() for key, own in model.state_dict().items()}
    config = load(None, [*(f"{key}={own}" for key, own in FEW.items()), f"train.objective={objective}"])
    data = open_dataset("mosaic", "train")
    told = rivals.train(model, processor, name, config, data, tmp_path)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(own, after[key]) for key, own in before.items())
    assert all(own.requires_grad for own in model.parameters())
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        adapted = rivals.load(model, tmp_path)
        learnt = {key: own for key, own in adapted.named_parameters() if ".lora_" in key}
        assert sum(own.numel() for own in learnt.values()) == told["parameters"]
        assert torch.equal(model(input_ids=ids).logits, plain) is (objective == "grpo" and not _moved(learnt))
        adapted.unload()
        assert torch.equal(model(input_ids=ids).logits, plain)


def _moved(learnt: dict[str, Any]) -> bool:
    """GRPO does nothing where no trajectories of a prompt differ in score."""
    return any(own.any() for key, own in learnt.items() if "lora_B" in key)


class Page(HTMLParser):
    """What a page refers to, and the cells of its tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value for key, value in attrs if key in ("src", "href") and value]
        if tag == "tr":
            self.rows.append([])

    def handle_data(self, data: str) -> None:
        if self.rows:
            self.rows[-1].append(data)


@pytest.mark.long
def test_the_page_needs_nothing_beside_itself(done: tuple[Path, dict[str, Any]]) -> None:
    place, told = done
    parsed = Page((place / page.PAGE).read_text(encoding="utf-8"))
    assert all(link.startswith(("#", "data:image/svg+xml;base64,")) for link in parsed.links)
    picture = next(link for link in parsed.links if link.startswith("data:"))
    assert base64.b64decode(picture.partition(",")[2]) == (place / "tiny.svg").read_bytes()
    shown: dict[str, list[str]] = {}
    for row in parsed.rows:
        shown.setdefault(row[0] if row else "", row[1:])  # the first table comes first
    accuracy = told["rows"]["memory"]["accuracy"]["new"]
    text = (place / page.TEXT).read_text(encoding="utf-8")
    assert f"| memory | {page.figure(accuracy)} |" in text
    assert shown["memory"][0].startswith(f"{accuracy['mean']:.3f}")
    assert json.loads((place / "tiny.json").read_text())["rows"] == json.loads(json.dumps(told["rows"]))


@pytest.mark.parametrize("figure", ["bars", "lines", "stages", "invocations", "costs"])
@pytest.mark.long
def test_plots_name_their_axes(done: tuple[Path, dict[str, Any]], tmp_path: Path, figure: str) -> None:
    _, told = done
    rows = {name: {**own, "x": at, "series": "s"} for at, (name, own) in enumerate(told["rows"].items())}
    rows["base"]["x"] = None
    shown = {**told, "figure": figure, "also": "right", "axis": "steps of something", "rows": rows}
    page.write([shown], tmp_path)
    text = (tmp_path / "tiny.svg").read_text(encoding="utf-8")
    labels = re.findall(r"<!-- (.*?) -->", text)
    wanted = {
        "bars": ("accuracy (mean over types", "new types"),
        "lines": ("accuracy, new types", "steps of something"),
        "stages": ("accuracy", "steps of something", "s, right"),
        "invocations": ("place in the answer", "invocations per answer", "long-term, memory"),
        "costs": ("accuracy, new types", "time of an answer, in those of 'base'"),
    }[figure]
    for label in wanted:
        assert any(own.startswith(label) for own in labels), (label, labels)
    with Image.open(tmp_path / "tiny.png") as drawn:
        assert len(drawn.convert("RGB").getcolors(1 << 20) or ()) > 10


@pytest.mark.long
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium is installed")
def test_the_page_opens_in_a_browser(done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    place, _ = done
    shot = tmp_path / "page.png"
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    size = ["--window-size=1000,1400", f"--screenshot={shot}"]
    subprocess.run([*command, *size, (place / page.PAGE).as_uri()], check=True, capture_output=True, timeout=120)
    with Image.open(shot) as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24) or ()}
    assert {(0, 114, 178), (255, 255, 255), (17, 17, 17)} <= colours  # the plot's first colour, the page, its text


@pytest.mark.long
def test_the_command(tmp_path: Path) -> None:
    run = CliRunner().invoke
    listed = run(app, ["experiment", "list", "--json"])
    assert {"main", "ablation", "forgetting"} <= json.loads(listed.stdout).keys()
    shown = json.loads(run(app, ["experiment", "show", "main", "--json"]).stdout)
    assert shown["rows"]["base"] == {"of": "the base", "trigger": "never"}
    assert run(app, ["experiment", "show"]).exit_code == 2
    path = tmp_path / "mine.yaml"
    path.write_text("title: Mine\nasks: What?\ndata: mosaic\nrows: {base: {}}\nper_type: 1\n", encoding="utf-8")
    assert run(app, ["experiment", str(path), "--seeds", "one"]).exit_code == 2
    told = run(
        app, ["experiment", str(path), "--seeds", "4", "--output", str(tmp_path / "out"), "--jobs", "1", "--json"]
    )
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)["experiments"][0]
    assert found["seeds"] == [4] and found["rows"]["base"]["accuracy"]["seen"]["error"] is None
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "cells", "experiments.md", "index.html", "mine.json", "mine.png", "mine.svg"
    }  # fmt: skip


@pytest.mark.long
def test_all_that_ships_runs(tmp_path: Path) -> None:
    """Every recipe in its quick form: all methods, settings, data, figures."""
    told = CliRunner().invoke(app, ["experiment", "all", "--quick", "--output", str(tmp_path), "--json"])
    assert told.exit_code == 0, told.output
    found = {own["experiment"]: own for own in json.loads(told.stdout)["experiments"]}
    assert set(found) == set(recipe_names())
    words = (tmp_path / page.TEXT).read_text(encoding="utf-8")
    assert words.count(page.TRIAL) == words.count(" --quick\n") == len(found)
    for name, own in found.items():
        assert own["rows"] and own["trial"], name
        assert {f"{name}.json", f"{name}.png", f"{name}.svg"} <= {path.name for path in tmp_path.iterdir()}
