"""A run goes on with its own base and its own data, or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import read, rows, run, written
from safetensors.torch import load_file
from tiny import qwen

from vismem_cli import main
from vismem_core.errors import TrainingError
from vismem_core.training import draws
from vismem_core.training import loop as loops


def other_weights() -> tuple[Any, Any]:
    model, processor = qwen()
    with torch.no_grad():
        for own in model.parameters():
            own.add_(torch.randn_like(own) * 0.05)
    return model, processor


def stopped(output: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Path:
    """A run that an error ended after its second step."""
    gradients, left = loops.Loop._gradients, iter(range(2))

    def failing(*args: Any) -> float:
        if next(left, None) is None:
            raise RuntimeError("the power is out")
        return gradients(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loops.Loop, "_gradients", failing)
        with pytest.raises(RuntimeError, match="the power is out"):
            run(output, **options)
    return output


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return written(tmp_path / "data" / "train.jsonl", rows(tmp_path / "data"))


def test_the_run_records_what_it_stands_on(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = stopped(tmp_path / "run", monkeypatch, data=read(data), heldout=read(data))
    told = json.loads((output / "run.json").read_text())
    assert told["data"] == told["heldout"] | {"source": str(data), "samples": 8}
    assert told["base"]["backbone"] == "qwen2_5_vl" and len(told["base"]["fingerprint"]) == 16
    assert told["base"]["dtype"] == "float32"
    assert told["processes"] == 1


def moved(path: Path) -> Path:
    """The same rows and images in another folder."""
    shutil.copytree(path.parent, path.parent.with_name("elsewhere"))
    return path.parent.with_name("elsewhere") / path.name


def changed(key: str) -> Callable[[Path], Path]:
    def change(path: Path) -> Path:
        told = [json.loads(line) for line in path.read_text().splitlines()]
        told[3][key] = "a boot"
        return written(path.with_name("other.jsonl"), told)

    return change


def fewer(path: Path) -> Path:
    return written(path.with_name("other.jsonl"), [json.loads(line) for line in path.read_text().splitlines()][:7])


def other_image(path: Path) -> Path:
    shutil.copytree(path.parent, path.parent.with_name("elsewhere"))
    place = path.parent.with_name("elsewhere")
    shutil.copy(place / "4.png", place / "3.png")
    assert (place / "3.png").stat().st_size != (path.parent / "3.png").stat().st_size
    return place / path.name


@pytest.mark.parametrize("change", [changed("answer"), changed("prompt"), fewer, other_image])
@pytest.mark.parametrize("part", ["data", "heldout"])
def test_other_data_are_refused(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], Path], part: str
) -> None:
    output = stopped(tmp_path / "run", monkeypatch, data=read(data), heldout=read(data))
    given = {"data": read(data), "heldout": read(data)} | {part: read(change(data))}
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    named = part
    with pytest.raises(TrainingError, match=rf"run\.json: the run's {named} is .*train\.jsonl .* and this is .*jsonl"):
        run(output, resume=True, **given)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


def test_the_same_data_elsewhere_will_do(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = stopped(tmp_path / "run", monkeypatch, data=read(data), heldout=read(data))
    run(output, data=read(moved(data)), heldout=read(data), resume=True)
    run(tmp_path / "whole", data=read(data), heldout=read(data))
    assert (output / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()
    ours, whole = (load_file(place / "memory.safetensors") for place in (output, tmp_path / "whole"))
    assert all(ours[name].equal(whole[name]) for name in whole)


def test_data_given_in_python_are_told_apart_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from runs import samples

    output = stopped(tmp_path / "run", monkeypatch)
    other = samples()
    other[5] = replace(other[5], answer="a coat")
    with pytest.raises(TrainingError, match="the run's data is given in Python"):
        run(output, data=other, resume=True)


def test_another_base_of_the_same_shape_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = stopped(tmp_path / "run", monkeypatch)
    with pytest.raises(TrainingError, match=r"run\.json: the run trains on .*fingerprint .* and this base is another"):
        run(output, base=other_weights(), resume=True)
    model, processor = qwen()
    with pytest.raises(TrainingError, match=r"dtype float32\), and this base is another \(dtype bfloat16"):
        run(output, base=(model.to(torch.bfloat16), processor), resume=True)
    assert run(output, resume=True)["samples"] == 4


def test_neither_base_nor_data_need_be_named_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vismem_core.base.loading import load_base

    model, processor, _ = load_base("qwen2_5_vl")
    with torch.no_grad():
        model.get_input_embeddings().weight[40:60].add_(0.01)
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    from vismem_core.files.samples import open_dataset

    told = []
    for at in range(6):
        sample = open_dataset("mosaic", "train")[at]
        sample.load_images()[0].save(tmp_path / f"{at}.png")
        told.append({"id": str(at), "image": f"{at}.png", "prompt": sample.prompt, "answer": sample.answer})
    written(tmp_path / "train.jsonl", told)
    steps = ["train.formation.steps=3", "train.invocation.steps=2", "train.eval_samples=1", "train.max_new_tokens=3"]
    sizes = ["train.formation.batch=2", "train.invocation.batch=2", "train.save_every=1"]
    monkeypatch.chdir(tmp_path)
    few = [word for own in [*steps, *sizes] for word in ("--set", own)]
    gradients, left = loops.Loop._gradients, iter(range(2))

    def failing(*args: Any) -> float:
        if next(left, None) is None:
            raise TrainingError("stop")
        return gradients(*args)

    def vismem(*words: str) -> int:
        with pytest.raises(SystemExit) as ended:
            main(list(words))
        return int(ended.value.code or 0)

    with monkeypatch.context() as patch:
        patch.setattr(loops.Loop, "_gradients", failing)
        assert vismem("train", "--model", "base", "--data", "train.jsonl", "--output", "out", *few) == 1
    assert vismem("train", "--resume", "--output", "out", "--data", "mosaic") == 1
    assert "the run's data is" in capsys.readouterr().err
    (tmp_path / "sub").mkdir()
    assert vismem("train", "--resume", "--output", "out") == 0, capsys.readouterr().err
    about = json.loads((tmp_path / "out" / "vismem.json").read_text())
    assert about["base"]["name"] == "base"
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 5


def test_another_number_of_processes_keeps_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that began on two processes: one process goes on with the batch of both."""
    output = stopped(tmp_path / "run", monkeypatch)
    told = json.loads((output / "run.json").read_text())
    (output / "run.json").write_text(json.dumps(told | {"processes": 2}))
    sizes: list[int] = []
    usable = draws.usable_batch

    def counted(backbone: Any, some: Any, out: Any) -> Any:
        sizes.append(len(some))
        return usable(backbone, some, out)

    monkeypatch.setattr(draws, "usable_batch", counted)
    run(output, resume=True)
    assert set(sizes) == {6}
    assert "began on 2 processes and goes on on 1; the steps' batches stay as large" in capsys.readouterr().err
