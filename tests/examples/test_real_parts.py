"""The example of real parts: how they are checked and put together, on stand-ins; all of it where packages are."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import tiny
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vismem_backbones.compose import compose
from vismem_core.files.samples import read

EXAMPLE = Path(__file__).parents[2] / "examples" / "real_parts"
ENCODER = "tf_efficientnet_lite0"
WHEELS = "VISMEM_REAL_PARTS"
"""Names a folder with the example's packages, downloaded by it or by pip."""


@pytest.fixture(scope="module")
def own() -> Iterator[Any]:
    """The example's modules."""
    names = ("parts", "projector")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLE)
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    for name in names:
        del sys.modules[name]


def elsewhere(state: dict[str, torch.Tensor]) -> OrderedDict[str, torch.Tensor]:
    """The same entries as another package names them."""
    return OrderedDict((f"_{name.replace('.', '_').replace('classifier', 'fc')}", own) for name, own in state.items())


def test_every_entry_of_the_encoder_finds_its_place(own: Any) -> None:
    torch.manual_seed(0)
    given = timm.create_model(ENCODER, pretrained=False).state_dict()
    given = {name: torch.rand_like(value) if value.is_floating_point() else value for name, value in given.items()}
    encoder = timm.create_model(ENCODER, pretrained=False, num_classes=0)
    own.parts.fill(encoder, elsewhere(given))
    filled = encoder.state_dict()
    assert (len(given), len(filled)) == (296, 294)
    assert all(filled[name].equal(given[name]) for name in filled)
    short = elsewhere(dict(list(given.items())[:100]))
    with pytest.raises(own.parts.PartsError, match=r"the encoder has blocks\S+ .* where the weights have nothing"):
        own.parts.fill(encoder, short)
    wrong = elsewhere(given | {"conv_head.weight": torch.zeros(3)})
    with pytest.raises(own.parts.PartsError, match=r"conv_head.weight \(1280, .* have _conv_head_weight \(3,\)"):
        own.parts.fill(encoder, wrong)
    with pytest.raises(own.parts.PartsError, match="no place for _more"):
        own.parts.fill(encoder, elsewhere(given) | {"_more": torch.zeros(1)})


def test_another_file_is_refused(own: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"a wheel"
    monkeypatch.setattr(own.parts, "WHEELS", {"part==1": ("part.whl", hashlib.sha256(content).hexdigest())})
    (tmp_path / "part.whl").write_bytes(content)
    own.parts.fetch(tmp_path)  # nothing is downloaded
    (tmp_path / "part.whl").write_bytes(b"another")
    with pytest.raises(own.parts.PartsError, match=r"part\.whl: is another file than it should be") as caught:
        own.parts.fetch(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(own.parts.PartsError, match="No such file"):
        own.parts.verify(tmp_path / "none.whl", "")


def stand_in(place: Path) -> Path:
    """A folder laid out as easy-vqa's."""
    asked = [
        ("what is the blue shape?", "circle", 0),
        ("what color is the shape?", "blue", 0),
        ("is there a red shape?", "no", 1),
        ("is there not a red shape in the image?", "yes", 1),
        ("is there a red shape?", "yes", 0),
        ("is there not a red shape in the image?", "no", 0),
        ("is there not a red shape in the image?", "no", 0),
        ("is no circle present?", "no", 2),
    ]
    for split in ("train", "test"):
        (place / split / "images").mkdir(parents=True)
        (place / split / "questions.json").write_text(json.dumps(asked))
        for image in (0, 1, 2):
            tiny.picture(64, 64, image).save(place / split / "images" / f"{image}.png")
    return place


def test_questions_become_rows(own: Any, tmp_path: Path) -> None:
    counts = own.parts.write_questions(stand_in(tmp_path / "theirs"), tmp_path / "data")
    assert counts == {"train": 6, "heldout": 6}
    data = read(tmp_path / "data" / "heldout.jsonl", need_answer=True)
    rows = {(row.prompt, row.answer, row.type) for row in data}
    assert ("what is the blue shape?", "circle", "shape") in rows
    assert ("what color is the shape?", "blue", "color") in rows
    assert {kind for _, _, kind in rows} == {"shape", "color", "present", "absent"}
    answers = [(row.type, row.answer) for row in data]
    assert all(answers.count((kind, answer)) == 1 for kind in ("present", "absent") for answer in ("yes", "no"))
    assert all(len(row.load_images()) == 1 for row in data)
    assert not (tmp_path / "data" / "images" / "test" / "2.png").exists()  # nobody asks about it


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_projector_alone_learns(own: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    own.parts.write_questions(stand_in(tmp_path / "theirs"), tmp_path / "data")
    data = read(tmp_path / "data" / "train.jsonl", need_answer=True)
    words = tiny._tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": None, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    torch.manual_seed(0)
    lm: Any = LlamaForCausalLM.from_pretrained(
        None, config=LlamaConfig(vocab_size=len(words), **sizes, **ends), state_dict={}, dtype=dtype
    )
    model, processor = compose(ENCODER, lm, tokenizer=words, pretrained=False, img_size=64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    told = own.projector.train(model, processor, data, steps=12, batch=len(data), lr=3e-2)
    assert told[-1] < told[0]
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert changed == {name for name in before if "multi_modal_projector" in name}
    assert {value.dtype for value in model.parameters()} == {dtype}
    right, wrong, better = own.projector.seen(model, processor, list(data), batch=2)
    assert right > 0 and wrong > 0 and 0 <= better <= len(data)


@pytest.mark.long
@pytest.mark.skipif(WHEELS not in os.environ, reason=f"{WHEELS} names no folder with the example's packages")
def test_memory_on_real_parts(tmp_path: Path) -> None:
    def run(*words: object) -> str:
        ran = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr[-2000:]
        return ran.stdout

    told = run(EXAMPLE / "build.py", "--output", tmp_path, "--wheels", os.environ[WHEELS])
    program, *words = told.split()
    assert program == "vismem" and words[0] == "train"
    short = "formation.steps=2 formation.batch=2 invocation.steps=1 invocation.batch=2 eval_samples=2"
    settings = [part for one in short.split() for part in ("--set", f"train.{one}")]
    report = json.loads(run("-m", "vismem_cli", *words, *settings, "--json"))
    assert set(report["heldout"]["memory"]) == {"shape", "color", "present", "absent"}
