"""Checkpoints that do not load: one line of our own that says what is wrong with which file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import vismem_core as vismem
from vismem_core.base.damage import fault
from vismem_core.base.loading import load_base
from vismem_core.errors import AttachError, CheckpointError, PluginError
from vismem_plugins.mini import path

MINI = path("qwen2_5_vl")


def changed(name: str, **values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        told = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps(told | values), encoding="utf-8")

    return change


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def broken(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_text("{oops", encoding="utf-8")

    return change


def cut_off(folder: Path) -> None:
    own = folder / "model.safetensors"
    own.write_bytes(own.read_bytes()[:100000])


def listed(folder: Path) -> None:
    own = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(own), encoding="utf-8")
    cut_off(folder)


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (without("config.json"), "it has no config.json: is this the folder of a model?"),
    "broken config": (broken("config.json"), "config.json is not valid JSON"),
    "no type": (changed("config.json", model_type=None), "config.json names no model_type"),
    "unknown type": (changed("config.json", model_type="wonder"), "knows no model type 'wonder'; a newer one may"),
    "no weights": (without("model.safetensors"), "it has no weights (model.safetensors)"),
    "cut off": (cut_off, "model.safetensors is damaged or cut off, 100000 bytes"),
    "no shard": (listed, "model-2.safetensors is missing, which model.safetensors.index.json names"),
    "no processor": (without("processor_config.json"), "it has no processor_config.json or preprocessor_config.json"),
    "no tokenizer": (without("tokenizer.json"), "it has no tokenizer (tokenizer.json)"),
    "broken tokenizer": (broken("tokenizer.json"), "tokenizer.json is not valid JSON"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    own = tmp_path / "own"
    shutil.copytree(MINI, own, ignore=shutil.ignore_patterns("memory"))
    return own


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("backbone", [None, "qwen2_5_vl"])
def test_what_is_wrong_with_a_checkpoint(folder: Path, name: str, backbone: str | None) -> None:
    change, message = FAULTS[name]
    change(folder)
    with pytest.raises(AttachError) as caught:
        load_base(backbone, str(folder))
    told = str(caught.value)
    assert told.startswith(f"{folder}: cannot be loaded: ") and message in told
    assert len(told) < len(str(folder)) + 200 and "http" not in told


def test_a_whole_checkpoint_has_no_fault() -> None:
    assert fault(MINI) == ""


def test_shapes_that_do_not_fit(folder: Path) -> None:
    told = json.loads((folder / "config.json").read_text())
    changed("config.json", text_config=told["text_config"] | {"intermediate_size": 128})(folder)
    with pytest.raises(AttachError, match=r"cannot be loaded: weights have other shapes than config\.json says$"):
        load_base(model=str(folder))


def test_weights_that_were_made_up_are_told(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    weights = load_file(folder / "model.safetensors")
    names = [name for name in sorted(weights) if name.endswith("q_proj.weight")][:2]
    left = {name: own for name, own in weights.items() if name not in names}
    save_file(left, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=r"not in the checkpoint are random now: .*q_proj\.weight"):
        load_base(model=str(folder))
    assert "LOAD REPORT" not in capfd.readouterr().err


def test_a_text_model_by_a_backbone_that_is_named(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(AttachError, match="cannot be loaded: a model of this type does not answer questions about"):
        load_base("qwen2_5_vl", str(folder))


def test_paths_are_no_hub_ids(tmp_path: Path) -> None:
    with pytest.raises(AttachError, match=r"/none: no such folder$"):
        load_base(model=str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda", "finds no GPU here; use --device cpu"),
        ("cuda:3", "finds no GPU here; use --device cpu"),
        ("mps", "finds no Apple GPU here"),
    ],
)
def test_a_device_that_is_not_there_is_told_before_loading(
    device: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr("vismem_core.base.backbone.Backbone.load", None)
    with pytest.raises(AttachError, match=f"^device '{device}.*{message}"):
        load_base("qwen2_5_vl", device=device)


def test_a_gpu_that_is_one_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("vismem_core.base.backbone.Backbone.load", None)
    with pytest.raises(AttachError, match=r"^device 'cuda:2': this machine has 2 GPUs, from cuda:0 to cuda:1"):
        load_base("qwen2_5_vl", device="cuda:2")


def test_the_shipped_memory_is_attached_by_name() -> None:
    model, processor, _ = load_base("qwen2_5_vl")
    memory = vismem.attach(model, processor, "shipped:qwen2_5_vl")
    stored = load_file(MINI / "memory" / "memory.safetensors")
    assert all(own.equal(stored[name]) for name, own in memory.trained().items())
    memory.detach()
    with pytest.raises(CheckpointError, match="no trained memory ships with qwen2_5_vl_wide"):
        vismem.attach(model, processor, "shipped:qwen2_5_vl_wide")
    with pytest.raises(PluginError, match="did you mean 'qwen2_5_vl'"):
        vismem.attach(model, processor, "shipped:qwen2_vl")
