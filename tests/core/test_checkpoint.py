"""Promise 7: a checkpoint holds what was trained, names its base, and refuses a base that it does not fit."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import QUESTIONS, Base, config, mini, tied, untied
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import vismem_core as vismem
from vismem_backbones.qwen2_5_vl import Qwen2_5_VL
from vismem_core.config import MemoryConfig, PolicyConfig
from vismem_core.errors import CheckpointError
from vismem_core.files import checkpoint


def saved(folder: Path, base: Base | None = None, settings: MemoryConfig | None = None, **about: Any) -> Path:
    memory = (base or tied()).attach(settings)
    memory.save(folder, **about)
    return folder


def load(folder: Path | str, base: Base | None = None, **options: Any) -> vismem.Memory:
    base = base or tied()
    return vismem.attach(base.model, base.processor, folder, **options)


@pytest.mark.parametrize("make", [tied, untied, mini])
@pytest.mark.parametrize("settings", [config(), config("transformer", builder="cross", trigger="anywhere:0.5")])
def test_round_trip(make: Any, settings: MemoryConfig, tmp_path: Path) -> None:
    first = make()
    memory = first.attach(settings)
    expected = first.generate(*QUESTIONS)
    memory.save(tmp_path / "new" / "folder", trained="on nothing")
    second = make()
    loaded = load(str(tmp_path / "new" / "folder"), second)
    assert loaded.config == settings
    got = second.generate(*QUESTIONS)
    assert len(loaded.trace) == len(memory.trace) > 0
    assert got.sequences.equal(expected.sequences)
    assert all(map(torch.equal, got.logits, expected.logits))
    assert checkpoint.description(tmp_path / "new" / "folder")["trained"] == "on nothing"


def test_settings_given_go_over_those_it_was_saved_with(tmp_path: Path) -> None:
    rows = config(trigger="anywhere:1")
    memory = tied().attach(rows)
    memory.save(tmp_path)
    lora = replace(rows, policy=PolicyConfig("lora", rank=4, alpha=8), budget=1)
    other = load(tmp_path, config=lora)
    trained, stored = other.trained(), memory.trained()
    added = trained.keys() - stored.keys()
    assert added and all(name.startswith("policy.") for name in added)
    assert all(trained[name].equal(stored[name]) for name in stored)
    assert (other.config, other.trigger) == (lora, "anywhere:1")
    model, processor = (base := tied()).model, base.processor
    with pytest.raises(CheckpointError, match=r"long\.initial has shape"):
        vismem.attach(model, processor, tmp_path, config=replace(rows, long=replace(rows.long, length=2)))
    assert vismem.attach(model, processor, tmp_path).config == rows  # and the refused one left the model free


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    memory, before = tied().attach(), os.umask(0o027)
    try:
        memory.save(tmp_path)
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        "README.md": 0o640,
        "memory.safetensors": 0o640,
        "vismem.json": 0o640,
    }


def test_two_readable_files_and_what_was_trained(tmp_path: Path) -> None:
    base = tied()
    memory = base.attach()
    memory.save(tmp_path)
    memory.save(tmp_path)  # again, over the first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "memory.safetensors", "vismem.json"]
    tensors = load_file(tmp_path / "memory.safetensors")
    assert tensors.keys() == memory.trained().keys()
    own = {name for name, tensor in base.model.named_parameters()}
    shapes = {tuple(tensor.shape) for name, tensor in tensors.items() if "adapter" in name}
    assert not own & tensors.keys()
    assert all(4 in shape for shape in shapes)  # the adapters' rank
    about = json.loads((tmp_path / "vismem.json").read_text())
    assert about["base"] | {"backbone": "qwen2_5_vl", "width": 32, "vision_width": 32} == about["base"]


def describe(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    about = json.loads((folder / "vismem.json").read_text())
    change(about)
    (folder / "vismem.json").write_text(json.dumps(about))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Other tensors, with a description that fits them."""
    tensors = load_file(folder / "memory.safetensors")
    change(tensors)
    save_file(tensors, folder / "memory.safetensors")
    describe(folder, lambda about: about.update(weights=checkpoint._digest(folder / "memory.safetensors")))


def damage(folder: Path, at: int) -> None:
    data = bytearray((folder / "memory.safetensors").read_bytes())
    data[at] ^= 0xFF
    (folder / "memory.safetensors").write_bytes(data)


def cut(folder: Path) -> None:
    data = (folder / "memory.safetensors").read_bytes()
    (folder / "memory.safetensors").write_bytes(data[: len(data) // 2])


SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "backbone": (lambda f: describe(f, lambda a: a["base"].update(backbone="llava")), "made for backbone llava"),
    "width": (lambda f: describe(f, lambda a: a["base"].update(width=64)), "width 64 .*this model has 32"),
    "vision": (lambda f: describe(f, lambda a: a["base"].update(vision_width=8)), "vision encoder width 8"),
    "vocabulary": (lambda f: describe(f, lambda a: a["base"].update(vocabulary=7)), "vocabulary 7"),
    "weights": (lambda f: describe(f, lambda a: a["base"].update(fingerprint="x")), "weights differ.*any_base=True"),
    "no base": (lambda f: describe(f, lambda a: a.pop("base")), "does not say which base"),
    "text for a base": (lambda f: describe(f, lambda a: a.update(base="mine")), "does not say which base"),
    "a number for a base": (lambda f: describe(f, lambda a: a["base"].update(name=7)), "does not say which base"),
    "NaN": (lambda f: rewrite(f, lambda t: t["short.gain"].fill_(torch.nan)), "short.gain holds NaN"),
    "whole numbers": (
        lambda f: rewrite(f, lambda t: t.update({"short.gain": t["short.gain"].long()})),
        "no real numbers",
    ),
    "format": (lambda f: describe(f, lambda a: a.update(format=99)), "format 99, this version reads 1"),
    "list": (lambda f: (f / "vismem.json").write_text("[]"), "format None"),
    "no JSON": (lambda f: (f / "vismem.json").write_text("{"), "not valid JSON"),
    "not text": (lambda f: (f / "vismem.json").write_bytes(b"\xff\xfe"), "not valid JSON"),
    "unknown key": (lambda f: describe(f, lambda a: a["memory"].update(qery={})), "did you mean 'query'"),
    "no config": (lambda f: describe(f, lambda a: a.pop("memory")), r"vismem\.json"),
    "flipped": (lambda f: damage(f, -1), "damaged or mixed up"),
    "cut": (cut, "damaged or mixed up"),
    "no weights": (lambda f: (f / "memory.safetensors").unlink(), r"memory\.safetensors is missing"),
    "no description": (lambda f: (f / "vismem.json").unlink(), r"vismem\.json is missing"),
    "tensor missing": (lambda f: rewrite(f, lambda t: t.pop("short.gain")), "short.gain is only in one"),
    "tensor added": (lambda f: rewrite(f, lambda t: t.update(x=torch.ones(1))), "x is only in one"),
    "shape": (lambda f: rewrite(f, lambda t: t.update({"short.gain": torch.ones(3)})), r"shape \(3,\), this"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "message"), SPOILT.values(), ids=SPOILT)
def test_what_does_not_fit_is_refused(spoil: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    spoil(saved(tmp_path))
    base = tied()
    before = [(name, id(module)) for name, module in base.model.named_modules()]
    with pytest.raises(CheckpointError, match=message) as error:
        load(tmp_path, base)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)
    assert [(name, id(module)) for name, module in base.model.named_modules()] == before
    assert "generate" not in vars(base.model)


@pytest.mark.parametrize("missing", ["nowhere", "./no/where", "/no/where", Path("no/where")])
def test_missing_folders(missing: Any) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        load(missing)


def test_other_bases(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(CheckpointError, match="weights differ"):
        load(tmp_path, tied(seed=1))
    other = tied(seed=1)
    assert load(tmp_path, other, any_base=True).trained()["short.gain"].equal(load(tmp_path).trained()["short.gain"])
    with pytest.raises(CheckpointError, match="vocabulary"):
        load(tmp_path, tied(spare=5), any_base=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_published_in_bf16_are_known_in_any_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    first, second = tied(), tied()
    with torch.no_grad():
        for base in (first, second):
            base.model.get_input_embeddings().weight[0] = torch.logspace(-30, 2, 32)
            base.model.to(torch.bfloat16)
    saved(tmp_path, first)
    second.model.to(dtype)
    assert load(tmp_path, second).backbone.dtype == dtype


def test_attached_memory_does_not_change_the_fingerprint() -> None:
    base = tied()
    plain = checkpoint.describe(Qwen2_5_VL(base.model, base.processor))
    assert checkpoint.describe(base.attach().backbone) == plain


FAILURES: dict[str, tuple[Any, str, Exception]] = {
    "disk full": (checkpoint, "save_file", OSError(28, "No space left on device")),
    "disk full, as safetensors says it": (checkpoint, "save_file", SafetensorError("I/O error: No space left")),
    "description": (Path, "write_text", OSError(28, "No space left on device")),
    "moving": (os, "replace", OSError(5, "Input/output error")),
}


@pytest.mark.parametrize(("place", "name", "error"), FAILURES.values(), ids=FAILURES)
def test_a_failing_write_leaves_the_old_files(
    place: Any, name: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tied()
    memory = base.attach()
    memory.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        memory.trained()["short.gain"].add_(1.0)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(place, name, fail)
        with pytest.raises(OSError):
            memory.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert load(tmp_path).config == memory.config
