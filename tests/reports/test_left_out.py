"""Rows that a model cannot use: told with file and line before training, or left out and listed."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from bases import Base, tied
from PIL import Image
from runs import read, rows, run, written

import vismem_core as vismem
from vismem_cli import main
from vismem_core.answers import checking
from vismem_core.answers.checking import checked, prepare
from vismem_core.answers.evaluation import evaluate
from vismem_core.errors import DataError
from vismem_core.files.samples import Dataset, Sample

FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "truncated image": ({"image": "cut.jpg"}, "the image .*cut.jpg does not decode"),
    "an image like a thread": ({"image": "thread.png"}, "images of 2000 x 4 pixels: .*aspect ratio"),
    "image token in prompt": (
        {"prompt": "what is <|image_pad|> ?"},
        r"the prompt holds <\|image_pad\|>, this model's own",
    ),
    "image token in answer": ({"answer": "a <|image_pad|> bag"}, r"the answer holds <\|image_pad\|>"),
    "place of an image in answer": ({"answer": "a <image> bag"}, "the answer holds <image>"),
    "memory token in answer": ({"answer": "a <ml_E> bag"}, "the answer holds <ml_E>, which would be learnt as text"),
}
HALF = {"prompt": "'prompt' holds '\\\\ud83d', half of a character", "answer": "'answer' holds '\\\\ud83d', half of a"}


def data(folder: Path, *faults: str, count: int = 8) -> Path:
    """A file of rows, the first of them with these faults."""
    told = rows(folder, count)
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:2000])
    Image.new("RGB", (2000, 4)).save(folder / "thread.png")
    for row, name in zip(told, faults, strict=False):
        row.update(FAULTS[name][0])
    return written(folder / "q.jsonl", told)


@pytest.mark.parametrize("name", FAULTS)
def test_told_by_file_and_line_before_training(tmp_path: Path, name: str) -> None:
    path = data(tmp_path / "data", name)
    with pytest.raises(DataError, match=rf"q\.jsonl:1: {FAULTS[name][1]}.*--on-bad-sample skip"):
        run(tmp_path / "run", data=read(path), heldout=read(path))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("check", ["all", "lazy"])
@pytest.mark.parametrize("objective", ["sft", "grpo"])
def test_left_out_and_listed(tmp_path: Path, check: Any, objective: str) -> None:
    """All faults at once, in both data sets: found before training or met on the way, the run ends well."""
    path, held = data(tmp_path / "data", *FAULTS, count=12), data(tmp_path / "held", *FAULTS, count=12)
    from runs import GRPO

    report = run(
        tmp_path / "run",
        GRPO if objective == "grpo" else [],
        data=read(path),
        heldout=read(held),
        on_bad="skip",
        check=check,
    )
    told = {(Path(own["file"]).parent.name, own["line"]): own["reason"] for own in report["skipped"]}
    lines = range(1, len(FAULTS) + 1)
    if check == "all":
        assert set(told) == {(folder, line) for folder in ("data", "held") for line in lines}
    assert set(told) <= {(folder, line) for folder in ("data", "held") for line in lines}
    assert {place for place in told if place[0] == "data"}, "none was met"
    for (_, line), why in told.items():
        assert re.search(list(FAULTS.values())[line - 1][1], why)
    assert report["samples"] >= 1
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 7 and all(step["loss"] is not None for step in steps)


@pytest.mark.parametrize("key", HALF)
def test_half_a_character_is_told_by_the_reader(tmp_path: Path, key: str) -> None:
    told = rows(tmp_path / "data")
    told[4][key] = "a \ud83d bag"
    path = written(tmp_path / "data" / "q.jsonl", told)
    with pytest.raises(DataError, match=rf"q\.jsonl:5: {HALF[key]}") as error:
        read(path)
    str(error.value).encode()
    assert [own.line for own in read(path, on_bad="skip").skipped] == [5]


def test_lazily_a_fault_is_told_where_it_is_met_and_nothing_is_lost(tmp_path: Path) -> None:
    path = data(tmp_path / "data", "truncated image")
    with pytest.raises(DataError, match=r"q\.jsonl:1: the image .*cut\.jpg does not decode"):
        run(tmp_path / "run", data=read(path), heldout=Dataset(read(path)[1:]), check="lazy")
    done = len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert (tmp_path / "run" / "state.safetensors").exists() == (done > 0)
    report = run(
        tmp_path / "run", data=read(path), heldout=Dataset(read(path)[1:]), check="lazy", on_bad="skip", resume=True
    )
    assert [own["line"] for own in report["skipped"]] == [1]


def test_what_is_drawn_in_place_of_a_bad_row_is_the_same_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vismem_core.training import loop as loops

    path = data(tmp_path / "data", "truncated image", "an image like a thread", count=12)
    given: dict[str, Any] = {"data": read(path), "check": "lazy", "on_bad": "skip"}
    whole = run(tmp_path / "whole", **given)
    gradients, left = loops.Loop._gradients, iter(range(3))

    def failing(*args: Any) -> float:
        if next(left, None) is None:
            raise RuntimeError("out")
        return gradients(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loops.Loop, "_gradients", failing)
        with pytest.raises(RuntimeError):
            run(tmp_path / "run", **given)
    again = run(tmp_path / "run", resume=True, **given)
    assert (tmp_path / "run/metrics.jsonl").read_text() == (tmp_path / "whole/metrics.jsonl").read_text()
    assert again["skipped"] == whole["skipped"] and len(whole["skipped"]) == 2


def test_a_file_without_a_usable_row(tmp_path: Path) -> None:
    path = data(tmp_path / "data", *FAULTS, count=len(FAULTS))
    with pytest.raises(DataError, match=rf"q\.jsonl:1: .* \(and {len(FAULTS) - 1} more bad rows\)"):
        run(tmp_path / "run", data=read(path), on_bad="skip")
    with pytest.raises(DataError, match="no usable sample is left in the data"):
        run(tmp_path / "run", data=read(path), on_bad="skip", check="lazy")


def test_rows_longer_than_the_context_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = rows(tmp_path / "data")
    told[2]["prompt"] = "a bag , " * 900
    told[5]["answer"] = "a coat . " * 1200
    path = written(tmp_path / "data" / "q.jsonl", told)
    run(tmp_path / "run", ["train.formation.steps=1", "train.invocation.steps=1"], data=read(path))
    err = " ".join(capsys.readouterr().err.split())
    assert "warning: 2 of 8 rows are longer than the model's context of 2048 tokens (the longest has" in err
    assert f"the first is {path}:3" in err


def test_lengths_are_those_of_the_models_inputs(any_base: Base, tmp_path: Path) -> None:
    path = written(tmp_path / "data" / "q.jsonl", rows(tmp_path / "data", 3))
    backbone = any_base.attach().backbone
    any_base.model.config.get_text_config(decoder=True).max_position_embeddings = 5
    found = checking.find(backbone, read(path), answers=False)
    longest = 0
    for sample in read(path):
        longest = max(longest, backbone.inputs([sample.prompt], [sample.load_images()])["input_ids"].shape[1])
    frame = backbone.inputs(["?"], [[]])["input_ids"].shape[1] - 1  # what the chat template writes around a question
    assert found.longest == pytest.approx(longest, abs=frame + 2)
    assert found.long == [0, 1, 2] and found.context == 5


def test_a_check_is_remembered_by_data_and_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISMEM_CACHE", str(tmp_path / "cache"))
    path, base = data(tmp_path / "data", "truncated image"), tied()
    backbone = base.attach().backbone
    looked: list[int] = []
    look = checking._look
    monkeypatch.setattr(checking, "_look", lambda own, some, told: looked.append(len(some)) or look(own, some, told))
    first = [checked(backbone, read(path), "skip") for _ in range(2)]
    assert looked == [8] and first[0].skipped == first[1].skipped and len(first[1]) == 7
    checked(backbone, read(path), "skip", answers=False)  # another question
    assert looked == [8, 8]
    written(path, rows(tmp_path / "data"))  # other data
    checked(backbone, read(path), "skip")
    base.processor.image_processor.max_pixels = 4000  # another processor
    checked(backbone, read(path), "skip")
    assert looked == [8] * 4
    for kept in (tmp_path / "cache" / "checks").iterdir():
        kept.write_text('{"faults": {"x": 1}}')  # a damaged memory is none
    assert len(checked(backbone, read(path), "skip")) == 8
    assert looked == [8] * 5


def test_the_blame_falls_on_one_row_of_a_batch(tmp_path: Path) -> None:
    backbone, path = tied().attach().backbone, data(tmp_path / "data", "an image like a thread")
    out: list[Any] = []
    good, inputs = prepare(backbone, read(path), out, answers=True)
    assert [sample.id for sample in good] == [str(at) for at in range(1, 8)] and inputs is not None
    assert [(own.line, Path(own.file).name) for own in out] == [(1, "q.jsonl")]
    with pytest.raises(DataError, match=r"q\.jsonl:1: "):
        prepare(backbone, read(path), answers=True)
    with pytest.raises(DataError, match=r"sample 'mine': the prompt holds <\|image_pad\|>"):
        prepare(backbone, [Sample("mine", (), "what <|image_pad|> ?")])


def test_evaluation_leaves_out_and_lists(tmp_path: Path) -> None:
    memory, path = tied().attach(), data(tmp_path / "data", *FAULTS, count=12)
    out: list[Any] = []
    report = evaluate(memory, read(path), max_new_tokens=2, left_out=out)
    assert report["samples"] + len(out) == 12
    assert {own.line for own in out} >= {1, 2}


def test_infer_leaves_out_lists_and_answers_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = data(tmp_path / "data", "truncated image", "image token in prompt")
    monkeypatch.chdir(tmp_path)
    for check in ("all", "lazy"):
        with pytest.raises(SystemExit) as ended:
            main(["infer", "--data", str(path), "--output", f"{check}.jsonl", "--check", check, "--batch", "3",
                  "--max-new-tokens", "2", "--on-bad-sample", "skip", "--json"])  # fmt: skip
        assert not ended.value.code
        told = json.loads(capsys.readouterr().out)
        assert [own["line"] for own in told["skipped"]] == [1, 2]
        answers = [json.loads(line)["id"] for line in Path(f"{check}.jsonl").read_text().splitlines()]
        assert answers == [str(at) for at in range(2, 8)]
        with pytest.raises(SystemExit) as ended:
            main(
                ["infer", "--data", str(path), "--output", f"{check}2.jsonl", "--check", check, "--max-new-tokens", "2"]
            )
        assert ended.value.code == 1
        assert f"error: {path}:1: the image" in capsys.readouterr().err


def test_bad_rows_of_heldout_are_told_before_training_and_in_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = rows(tmp_path / "data")
    written(tmp_path / "data" / "train.jsonl", told)
    for row in told[:5]:
        row["image"] = "missing.png"
    written(tmp_path / "data" / "held.jsonl", told)
    monkeypatch.chdir(tmp_path)
    few = ["train.formation.steps=1", "train.invocation.steps=1", "train.formation.batch=2", "train.invocation.batch=2"]
    settings = [word for own in [*few, "train.max_new_tokens=2"] for word in ("--set", own)]
    with pytest.raises(SystemExit) as ended:
        main(["train", "--data", "data/train.jsonl", "--heldout", "data/held.jsonl", "--on-bad-sample", "skip",
              "--output", "out", "--json", *settings])  # fmt: skip
    assert not ended.value.code
    seen = capsys.readouterr()
    report = json.loads(seen.out)
    assert [(Path(own["file"]).name, own["line"]) for own in report["skipped"]] == [
        ("held.jsonl", n) for n in range(1, 6)
    ]
    assert json.loads(Path("out/report.json").read_text())["skipped"] == report["skipped"]
    assert report["samples"] == 3
    begun = seen.err.index("formation")
    assert seen.err.index("bad rows were left out: 5") < begun
    assert str(Path("data/held.jsonl")) + ":1: no such image" in seen.err


def test_large_files_are_checked_in_parallel_with_a_bar(tmp_path: Path) -> None:
    told = [row | {"id": str(at)} for at, row in enumerate(rows(tmp_path / "data") * 80)]
    random.Random(0).shuffle(told)
    path, seen = written(tmp_path / "data" / "q.jsonl", told), []
    found = checking.find(
        tied().attach().backbone, read(path), answers=True, progress=lambda done, of: seen.append((done, of))
    )
    assert not found.faults and seen == [(256, 640), (512, 640), (640, 640)]


def test_memory_is_not_needed_to_check(tmp_path: Path) -> None:
    model, processor = tiny.qwen()
    memory = vismem.attach(model, processor)
    assert len(checked(memory.backbone, read(data(tmp_path / "d")), "fail")) == 8
