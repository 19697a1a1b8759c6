"""``vismem backbones``: families, and what memory would do with a model whose weights are not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING
from typer.testing import CliRunner

from vismem_cli.app import app


def check(source: Path | str, *options: str) -> Any:
    return CliRunner().invoke(app, ["backbones", "--check", str(source), *options])


def told(folder: Path, model_type: str, **text: Any) -> dict[str, Any]:
    config = CONFIG_MAPPING[model_type]().to_dict()
    config["text_config"] |= text
    CONFIG_MAPPING[model_type].from_dict(config).save_pretrained(folder)
    done = check(folder, "--json")
    found = json.loads(done.stdout)
    assert done.exit_code == (1 if found["attaches"] is False else 0)
    return found  # type: ignore[no-any-return]


def test_a_family_of_its_own(tmp_path: Path) -> None:
    found = told(tmp_path, "qwen2_5_vl")
    assert found["attaches"] is True and found["backbone"] == "qwen2_5_vl" and "video" in found["features"]
    assert set(found["layers"]) == {"full"} and found["without"] == {}


@pytest.mark.parametrize(("model_type", "backbone"), [("qwen3_5", "qwen3_5"), ("minicpmv4_6", "generic")])
def test_states_hold_images(model_type: str, backbone: str, tmp_path: Path) -> None:
    found = told(tmp_path, model_type)
    assert found["attaches"] is True and found["backbone"] == backbone
    assert found["layers"]["state"] > 0 and found["layers"]["full"] > 0
    assert "linear attention" in found["without"]["memory.drop_image_after_invocation"]


@pytest.mark.parametrize(("model_type", "backbone"), [("qwen3_vl", "qwen3_vl"), ("ernie4_5_vl_moe", "generic")])
def test_prompts_that_carry_more_than_embeddings(model_type: str, backbone: str, tmp_path: Path) -> None:
    found = told(tmp_path, model_type)
    assert found["attaches"] is True and found["backbone"] == backbone
    assert list(found["without"]) == ["memory.long.context=recompute"]


def test_ropes_that_change(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    found = told(tmp_path, "llava", rope_parameters=rope)
    assert found["attaches"] is False and "rope_type 'dynamic'" in found["why"]


def test_what_breaks_a_promise(tmp_path: Path) -> None:
    found = told(tmp_path, "janus")
    assert found["attaches"] is False and "generate() of its own" in found["why"]


@pytest.mark.parametrize("model_type", ["clip", "llama"])
def test_what_is_no_vision_language_model(model_type: str, tmp_path: Path) -> None:
    CONFIG_MAPPING[model_type]().save_pretrained(tmp_path)
    done = check(tmp_path, "--json")
    assert done.exit_code == 1
    why = json.loads(done.stdout)["why"]
    assert why.startswith(f"no backbone knows model type '{model_type}'")
    assert ("compose" if model_type == "llama" else "answers questions about images") in why


def test_as_a_table(tmp_path: Path) -> None:
    CONFIG_MAPPING["qwen2_5_vl"]().save_pretrained(tmp_path)
    done = check(tmp_path)
    assert done.exit_code == 0 and "memory attaches" in done.stdout and "qwen2_5_vl" in done.stdout


def test_what_is_not_there(tmp_path: Path) -> None:
    done = check(tmp_path / "nowhere")
    assert done.exit_code != 0
