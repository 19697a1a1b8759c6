"""Bases that processes hold together: who may, what is refused, and that memory is the same (tensor.py)."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from launch import launch
from transformers import AutoConfig
from typer.testing import CliRunner

from vismem_cli.app import app
from vismem_core.base import tensor
from vismem_core.base.compiled import Compiler
from vismem_core.base.loading import load_base
from vismem_core.errors import AttachError
from vismem_core.files.results import Results
from vismem_core.plugins import registry
from vismem_core.training.processes import Processes

FAMILIES = ("qwen2_5_vl", "internvl", "llava", "llava_next", "llava_onevision", "timm_lm")


@pytest.mark.long
def test_two_that_hold_a_base_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They also speak and write once."""
    script = str(Path(__file__).with_name("tensor.py"))
    monkeypatch.setattr(sys, "argv", [script, str(tmp_path), "cpu", *FAMILIES])
    runpy.run_path(script, run_name="__main__")
    asked = [{"id": str(at), "prompt": "what is it ?"} for at in range(3)]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    told = launch([sys.executable, script, str(tmp_path), "tensor:2", *FAMILIES, "infer"], 2)
    assert json.loads(told[0])["answered"] == 3
    assert told[1] == ""
    answers = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in answers] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("device", "processes", "told"),
    [
        ("tensor", 1, r"one process has nobody.*torchrun --nproc_per_node 2 -m vismem_cli"),
        ("tensor:4", 1, r"torchrun --nproc_per_node 4"),
        ("tensor:1", 2, r"one process has nobody"),
        ("tensor:four", 2, r"tensor:N takes the number"),
        ("tensor:4", 6, r"6 processes are no groups of 4"),
    ],
)
def test_numbers_that_make_no_groups(device: str, processes: int, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor, "everyone", lambda: SimpleNamespace(num_processes=processes))
    with pytest.raises(AttachError, match=told):
        load_base("llava", device=device)


def test_as_many_as_a_machine_has_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor, "everyone", lambda: SimpleNamespace(num_processes=8))
    assert [tensor.asked(name) for name in ("tensor", "tensor:2", "cuda", "map")] == [8, 2, 0, 0]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert tensor.asked("tensor") == 4


def _quantised() -> Any:
    config = AutoConfig.for_model("qwen2_5_vl")
    config.quantization_config = {"quant_method": "awq"}
    return config


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (lambda: tiny.qwen()[0].config, r"4 processes cannot share its 2 key heads evenly; use --device map"),
        (lambda: AutoConfig.for_model("qwen3_vl"), r"no plan that splits.*qwen3_vl_text.*use --device map"),
        (lambda: AutoConfig.for_model("idefics"), r"no plan that splits"),
        (_quantised, r"quantised \(awq\)"),
    ],
)
def test_bases_that_cannot_be_split(config: Any, told: str) -> None:
    with pytest.raises(AttachError, match=f"^a/b: .*{told}"):
        tensor.refuse("a/b", config(), 4)


def test_a_family_may_say_why_not() -> None:
    with pytest.raises(AttachError, match=r"^a/b: its MLPs keep what stands out.*use --device map"):
        tensor.refuse("a/b", AutoConfig.for_model("gemma3n"), 2, registry("backbones").get("gemma3n").undivided)


def test_a_class_that_drops_its_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the loaded class tells that; transformers' own words name settings that are not the user's."""

    def fails(*_: Any, **__: Any) -> Any:
        raise ValueError("`tp_size=2` was requested, but `Own` has no `tp_plan`. Pass `tp_plan` in `DistributedConfig`")

    monkeypatch.setattr(tensor, "everyone", lambda: SimpleNamespace(num_processes=2))
    monkeypatch.setattr(registry("backbones").get("llava"), "load", fails)
    with pytest.raises(AttachError, match=r"no plan that splits this model's attention; use --device map"):
        load_base("llava", device="tensor:2")


def test_a_base_that_can() -> None:
    tensor.refuse("a/b", tiny.qwen()[0].config, 2)


def test_passes_over_parts_are_not_compiled() -> None:
    model = SimpleNamespace(_tp_size=2, _device_mesh={"tp": "two"})
    compiler = Compiler(SimpleNamespace(model=model, decoder=None))
    assert compiler.wanted(None, {}, asked=False) is None
    with pytest.raises(AttachError, match=r"set memory\.compile=false"):
        compiler.wanted(None, {}, asked=True)


def test_those_that_hold_a_base_have_one_part_and_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    everyone = [object.__new__(Processes) for _ in range(4)]
    for index, own in enumerate(everyone):
        state = SimpleNamespace(process_index=index, num_processes=4, device=torch.device("cpu"))
        vars(own).update(_state=state, _holders=2)
    assert [own.part(range(6)) for own in everyone] == [[0, 2, 4], [0, 2, 4], [1, 3, 5], [1, 3, 5]]
    assert [own.count for own in everyone] == [2] * 4
    assert [own.leads for own in everyone] == [True, True, False, False]
    rows = torch.tensor([[1.0, 3.0], [1.0, 3.0], [2.0, 4.0], [2.0, 4.0]])
    monkeypatch.setattr("vismem_core.training.processes.reduce", lambda value, how: rows.sum(0))
    monkeypatch.setattr("vismem_core.training.processes.gather", lambda value: rows.flatten())
    assert everyone[3].total(rows[3]).tolist() == [3.0, 7.0]
    assert everyone[3].joined(rows[3]).tolist() == [1.0, 2.0, 3.0, 4.0]


def test_those_that_do_not_write_answers_read_them(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    row = {"id": "1", "question": "q", "text": "a"}
    with Results(path, {}, writes=False) as alone:
        alone.add(row)
    assert not path.exists()
    with Results(path, {}) as writer:
        writer.add(row)
        with Results(path, {}, writes=False) as reader:
            reader.add({**row, "id": "2"})
            assert reader.kept == {"1": "q"}
    assert len(path.read_text().splitlines()) == 1


@pytest.mark.parametrize("command", [["probe"], ["experiment", "main"]])
def test_commands_of_one_process(command: list[str]) -> None:
    done = CliRunner().invoke(app, [*command, "--device", "tensor:2"])
    assert done.exit_code == 2
    assert "only train, infer and eval share a base" in " ".join(done.output.replace("│", " ").split())


@pytest.mark.parametrize("device", ["auto", "tensor:4"])
def test_several_answer_together_or_not_at_all(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = CliRunner().invoke(app, ["infer", "--device", device])
    assert done.exit_code == 2
    assert "2 processes answer only if all hold one base" in " ".join(done.output.replace("│", " ").split())
