"""Checkpoints by folder and by hub id: what loads, and what is said where nothing can be fetched."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from bases import QUESTIONS, Base, config

from vismem_backbones.qwen2_5_vl import Qwen2_5_VL
from vismem_core.base import loading
from vismem_core.base.loading import load_base
from vismem_core.errors import AttachError

PUBLISHED = {
    "qwen2_5_vl": "Qwen/Qwen2.5-VL-3B-Instruct",
    "llava": "llava-hf/llava-1.5-7b-hf",
    "llava_next": "llava-hf/llava-v1.6-mistral-7b-hf",
    "llava_onevision": "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
    "llava_onevision1_5": "lmms-lab/LLaVA-OneVision-1.5-4B-Instruct",
    "internvl": "OpenGVLab/InternVL3-1B-hf",
}
MADE = {
    "qwen2_5_vl": tiny.qwen,
    "llava": tiny.llava,
    "llava_next": tiny.llava_next,
    "llava_onevision": tiny.llava_onevision,
    "internvl": tiny.internvl,
}
OFFLINE = """
import sys
from vismem_cli import main
for name, source in {!r}.items():
    for known in ([], ["--backbone", name]):
        try: main(["train", "--data", "mosaic", "--model", source, *known])
        except SystemExit as end: print(end.code)
"""


def test_a_device_that_is_none_is_told() -> None:
    with pytest.raises(AttachError, match=r"^device 'gpu': Expected one of cpu"):
        load_base("llava", device="gpu")


@pytest.mark.long
def test_hub_ids_without_a_network_are_told_in_one_line(tmp_path: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", OFFLINE.format(PUBLISHED)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["1"] * 2 * len(PUBLISHED), done.stderr
    expected = [
        f"error: {source}: no such folder, and the hub is switched off (HF_HUB_OFFLINE); name a folder that holds "
        "the checkpoint"
        for source in PUBLISHED.values()
        for _ in range(2)
    ]
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == expected
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("family", MADE)
def test_a_saved_checkpoint_loads_and_takes_memory(family: str, tmp_path: Path) -> None:
    make: Callable[[], tuple[Any, Any]] = MADE[family]
    before = Base(*make())
    before.model.save_pretrained(tmp_path)
    before.processor.save_pretrained(tmp_path)
    model, processor, name = load_base(model=str(tmp_path), dtype="float32", device="cpu")
    assert (name, type(model), type(processor)) == (family, type(before.model), type(before.processor))
    after = Base(model, processor)
    assert after.generate(*QUESTIONS).answers.equal(before.generate(*QUESTIONS).answers)
    memory = after.attach(config(trigger="schedule:1=short,4=long"))
    after.generate(*QUESTIONS, eos_token_id=None)
    assert [len(memory.trace.row(row)) for row in range(len(QUESTIONS))] == [2] * len(QUESTIONS)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    model, processor = tiny.llava()
    model.config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(AttachError, match=r"cannot be loaded: .*model\.safetensors") as caught:
        load_base(model=str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rank", "processes", "gpus", "expected"),
    [(0, 1, 4, None), (0, 2, 4, [0, 2]), (1, 2, 4, [1, 3]), (1, 2, 5, [1, 3]), (2, 3, 5, [2]), (1, 2, 0, None)],
)
def test_processes_share_the_gpus_that_a_base_is_spread_over(
    rank: int, processes: int, gpus: int, expected: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = loaded_with(monkeypatch, rank, processes, gpus)
    assert asked["device_map"] == "auto"
    assert asked.get("max_memory") == (expected and {gpu: 10 + gpu for gpu in expected})


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AttachError, match="3 processes on a machine with 2 GPUs"):
        loaded_with(monkeypatch, 2, 3, 2)


def loaded_with(monkeypatch: pytest.MonkeyPatch, rank: int, processes: int, gpus: int) -> dict[str, Any]:
    """What ``from_pretrained`` is asked for by ``--device map`` on a machine with so many GPUs."""
    asked: dict[str, Any] = {}

    def load(source: str, **options: Any) -> Any:
        asked.update(options)
        return tiny.qwen()

    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(loading, "get_max_memory", lambda: {gpu: 10 + gpu for gpu in range(gpus)} | {"cpu": 99})
    monkeypatch.setattr(Qwen2_5_VL, "load", load)
    load_base("qwen2_5_vl", device="map")
    return asked
