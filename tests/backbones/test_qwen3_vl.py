"""Qwen3-VL and Qwen3.5: what differs from Qwen2.5-VL."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from bases import config
from model_types import build as tiny_of
from transformers import CONFIG_MAPPING

from vismem_backbones.qwen3_vl import Qwen3_5, Qwen3_VL
from vismem_core import attach
from vismem_core.base.outlook import outlook
from vismem_core.base.vision import VisionStates
from vismem_core.errors import AttachError
from vismem_core.testing import liven
from vismem_core.testing.liveliness import awaken, moved
from vismem_plugins.mini.build import build

TEXTS = ["<|vision_start|><|video_pad|><|vision_end|>what is at row 1", "<|vision_start|><|image_pad|><|vision_end|>a"]


def film(seed: int) -> list[np.ndarray]:  # type: ignore[type-arg]
    return [np.asarray(tiny.picture(56, 56, seed + at)) for at in range(4)]


def test_a_video_is_pieces_between_time_stamps_and_all_of_it_is_seen() -> None:
    model, processor = build("qwen3_vl")
    model.eval()
    liven(model)
    backbone = Qwen3_VL(model, processor)

    def inputs(seed: int) -> dict[str, torch.Tensor]:
        images = [tiny.picture(56, 28, 9)]
        batch = processor(text=TEXTS, images=images, videos=[film(seed)], padding=True, return_tensors="pt")
        return dict(batch)

    told, states = inputs(0), VisionStates()
    with torch.no_grad(), backbone.record(states, keep=True, inputs=False):
        model(**told)
    counts = [(told["input_ids"] == token).sum(-1).tolist() for token in backbone.placeholders.values()]
    assert counts[1][0] == told["video_grid_thw"].prod().item() // 4 > 4
    pads = (told["input_ids"][0] == backbone.placeholders["video"]).int()
    assert (pads.diff() == 1).sum() > 1  # time stamps stand between the pieces
    states.assign(counts)
    assert states.rows == [[1], [0]] and states.tokens == [counts[0][1], counts[1][0]]
    memory = attach(model, processor, config=config(trigger="schedule:1=short,5=long"))
    awaken(memory)
    latents = []
    for seed in (0, 50):
        model.generate(**inputs(seed), max_new_tokens=8, eos_token_id=None, do_sample=False)
        assert len(memory.trace) == 4
        latents.append([own.latents for own in memory.trace.invocations if own.kind == "short"])
    assert moved(latents[0][0], latents[1][0]), "another video makes no difference to its row"
    torch.testing.assert_close(latents[0][1], latents[1][1])


@pytest.mark.parametrize(
    ("model_type", "family"),
    [("qwen3_vl", Qwen3_VL), ("qwen3_vl_moe", Qwen3_VL), ("qwen3_5", Qwen3_5), ("qwen3_5_moe", Qwen3_5)],
)
def test_it_is_found_by_the_model_and_by_its_configuration(
    model_type: str, family: type[Qwen3_VL], tmp_path: Path
) -> None:
    memory = attach(*tiny_of(model_type))
    assert type(memory.backbone) is family
    CONFIG_MAPPING[model_type]().save_pretrained(tmp_path)
    found = outlook(str(tmp_path))
    assert found.backbone == family.name and found.attaches
    refused = {name.rpartition(".")[2] for name in found.without}
    assert refused == ({"context=recompute"} if family is Qwen3_VL else {"drop_image_after_invocation"})


def test_what_a_prompt_carries_is_not_read_again() -> None:
    with pytest.raises(AttachError, match=r"memory\.long\.context=cache"):
        attach(*tiny_of("qwen3_vl"), config=config(context="recompute"))


def test_long_memory_reaches_linear_attention_too() -> None:
    memory = attach(*tiny_of("qwen3_5"))
    layers = {name.split(".lora")[0].rpartition(".")[2] for name in memory.trained() if name.startswith("long.")}
    assert layers >= {"q_proj", "v_proj", "in_proj_qkv"}, json.dumps(sorted(layers))
