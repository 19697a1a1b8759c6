"""Videos of models that no file knows: Qwen2-VL, and LLaVA-NeXT-Video, whose encoder memory does not pass."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from bases import Base, config
from model_types import END, IMAGE, START, VIDEO, build
from PIL import Image
from reference import one_pass
from transformers import (
    LlavaNextImageProcessor,
    LlavaNextVideoProcessor,
    LlavaNextVideoVideoProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from vismem_backbones.generic import Generic
from vismem_core.base.vision import VisionStates


def qwen2_vl() -> Base:
    model, stand_in = build("qwen2_vl")
    vision, words = model.config.vision_config, stand_in.tokenizer
    sizes = {"patch_size": vision.patch_size, "temporal_patch_size": vision.temporal_patch_size}
    sizes |= {"merge_size": vision.spatial_merge_size, "min_pixels": 64, "max_pixels": 4096}
    words.image_token, words.video_token = IMAGE, VIDEO
    look = Qwen2VLImageProcessor(**sizes), words, Qwen2VLVideoProcessor(**sizes)
    template = tiny._template(f"{START}{IMAGE}{END}", f"{START}{VIDEO}{END}")
    return Base(model, Qwen2VLProcessor(*look, chat_template=template))


def llava_next_video() -> Base:
    model, stand_in = build("llava_next_video")
    vision = model.config.vision_config
    side = {"size": {"shortest_edge": vision.image_size}}
    side["crop_size"] = {"height": vision.image_size, "width": vision.image_size}
    processor = LlavaNextVideoProcessor(
        video_processor=LlavaNextVideoVideoProcessor(**side),
        image_processor=LlavaNextImageProcessor(**side, image_grid_pinpoints=model.config.image_grid_pinpoints),
        tokenizer=stand_in.tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tiny._template(f"{IMAGE}\n", f"{VIDEO}\n"),
    )
    return Base(model, processor)


def inputs(base: Base, video: list[Image.Image]) -> Any:
    text = base.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "what falls ?"}]}],
        add_generation_prompt=True,
    )
    options = {"do_sample_frames": False}
    return base.processor(text=[text], videos=[video], return_tensors="pt", videos_kwargs=options)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:extra tokens have no way")
@pytest.mark.parametrize("make", [qwen2_vl, llava_next_video])
@pytest.mark.parametrize("context", ["cache", "recompute"])
def test_memory_sees_videos_and_equals_one_pass(make: Any, context: str) -> None:
    base = make()
    memory = base.attach(config(trigger="schedule:1=short,4=long", context=context))
    assert not memory.backbone.no_videos
    assert memory.backbone.placeholders["video"] not in memory.backbone.unseen.values()
    formed = []
    for seed in (0, 20):
        prompt = inputs(base, [tiny.picture(32, 16, seed + at) for at in range(4)])
        told = base.model.generate(
            **prompt, max_new_tokens=8, eos_token_id=None, output_logits=True, return_dict_in_generate=True
        )
        expected = one_pass(memory, prompt, told.sequences[0, prompt["input_ids"].shape[1] :].tolist())
        got = torch.cat(told.logits)[:, : expected.logits.shape[1]]
        torch.testing.assert_close(got, expected.logits, atol=1e-4, rtol=1e-4)
        formed.append(memory.trace.row(0)[0].latents)
    assert not torch.allclose(*formed, atol=1e-2), "another video forms the same short memory"


@torch.no_grad()
def test_a_still_video_is_the_image() -> None:
    """Two frames go into a patch: of two that are alike, short memory sees what it sees of their image."""
    base = qwen2_vl()
    own, still = Generic(base.model, base.processor), tiny.picture(32, 16, 5)
    extra, carried, kept = torch.randn(1, 8, own.vision_width), [], []
    for prompt in (inputs(base, [still, still]), own.inputs(["what falls ?"], [[still]])):
        states = VisionStates()
        with own.record(states, keep=True, inputs=True):
            base.model(**prompt)
        states.assign([(prompt["input_ids"] == token).sum(-1).tolist() for token in own.placeholders.values()])
        assert states.rows == [[0]] and states.patches == [states.tokens[0] * own.merge]
        again = VisionStates()
        with own.record(again, keep=True, inputs=False):
            own.encode(states.inputs[0])
        assert all(map(torch.equal, again.keys, states.keys))
        carried.append(own.carry(extra, states, [0]))
        kept.append(states)
    torch.testing.assert_close(*carried, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(carried[0], own.carry(extra, VisionStates(rows=[[]]), [0]), atol=1e-3)
