"""The LLaVA family: what is its own beside tiles, and LLaVA-OneVision-1.5, on a model of its structure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import towers
from bases import QUESTIONS, Base, config, llava_onevision, rice

from vismem_backbones.llava import Llava, LlavaOneVision, LlavaOneVision15
from vismem_core.base.loading import load_base
from vismem_core.base.vision import VisionStates
from vismem_core.errors import AttachError


@torch.no_grad()
@pytest.mark.parametrize("layers", [-2, [1, -2], 3])
def test_patches_are_projected_as_the_model_projects_them(layers: Any) -> None:
    model, processor = tiny.llava(vision_feature_layer=layers)
    backbone, pixels = Llava(model, processor), torch.randn(2, 3, tiny.TILE, tiny.TILE)
    out = model.model.get_image_features(pixels, output_hidden_states=True)
    chosen = [layers] if isinstance(layers, int) else layers
    tokens = torch.cat([out.hidden_states[layer] for layer in chosen], dim=-1)[:, 1:]
    assert all(map(torch.equal, backbone.project(tokens), out.pooler_output))


@torch.no_grad()
def test_siglip_below_llava() -> None:
    """A tower without class tokens: none is dropped, all are counted."""
    siglip = {"model_type": "siglip_vision_model", "image_size": tiny.TILE, "patch_size": tiny.PATCH}
    model, processor = tiny.llava(vision=siglip, vision_feature_select_strategy="full")
    backbone = Llava(model, processor)
    states = VisionStates()
    with backbone.record(states, keep=True, inputs=False):
        out = model.model.get_image_features(torch.randn(2, 3, tiny.TILE, tiny.TILE))
    assert states.patches == states.tokens == [len(own) for own in out.pooler_output] == [16, 16]


@torch.no_grad()
def test_videos() -> None:
    """A video's frames are its tiles; images come first, whatever the order in the batch."""
    base = llava_onevision()
    backbone = LlavaOneVision(base.model, base.processor)
    videos = [np.stack([np.asarray(tiny.picture(16, 16, 10 * own + seed)) for seed in range(2)]) for own in range(2)]
    inputs = base.processor(
        text=["<video> ?", "<image> what ?", "<video> is it <image> ?"],
        images=[[tiny.picture(40, 20, 5)], [tiny.picture(16, 16, 6)]],
        videos=videos,
        padding=True,
        return_tensors="pt",
        do_sample_frames=False,
    )
    states = VisionStates()
    with backbone.record(states, keep=True, inputs=False):
        towers.features(base.model.model, inputs)
        base.model.model.get_video_features(inputs["pixel_values_videos"])
    states.assign([(inputs["input_ids"] == token).sum(-1).tolist() for token in backbone.placeholders.values()])
    wide, square = tiles(base, 40, 20), tiles(base, 16, 16)
    images, films = list(range(wide + square)), [wide + square + own for own in range(4)]
    assert states.rows == [films[:2], images[:wide], images[wide:] + films[2:]]
    plain = base.model.generate(**inputs, max_new_tokens=8, eos_token_id=None)
    memory = base.attach(config(trigger="schedule:1=short,4=long"))
    answers = base.model.generate(**inputs, max_new_tokens=8, eos_token_id=None)
    assert len(memory.trace) == 6
    assert answers[:, : plain.shape[1] - 7].equal(plain[:, :-7])


def tiles(base: Base, width: int, height: int) -> int:
    """Tiles of one image in a prompt of its own."""
    return len(towers.entering(base.model.model, base.inputs(("?", [tiny.picture(width, height, 0)]))))


@torch.no_grad()
def test_rice() -> None:
    """Extra tokens see all patches and class tokens of their row's images, and turn nowhere."""
    base = rice()
    backbone = LlavaOneVision15(base.model, base.processor)
    inputs = base.inputs(*QUESTIONS)
    visual, grids = base.model.model.visual, inputs["image_grid_thw"]
    states = VisionStates()
    with backbone.record(states, keep=True, inputs=True):
        merged = towers.features(base.model.model, inputs)
    assert states.patches == [1 + int(grid.prod()) for grid in grids]
    states.assign([(inputs["input_ids"] == token).sum(-1).tolist() for token in backbone.placeholders.values()])
    assert states.rows == [[0], [1, 2], [], [3]]
    extra = torch.randn(4, 8, backbone.vision_width)
    carried = backbone.carry(extra, states, [0, 1, 2, 3])
    kept = []
    for row, question in enumerate(QUESTIONS):
        patches, expected = towers.encode(base.model, base.model, base.inputs(question), extra[row])
        torch.testing.assert_close(carried[row], expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            backbone.project(carried[row][None])[0], visual.merger(expected), atol=1e-3, rtol=1e-3
        )
        kept += [own[1:] for own in patches.split([states.patches[image] for image in states.rows[row]])]
    # The written-out encoder is right about the patches themselves.
    torch.testing.assert_close(
        visual.merger(torch.cat([own for own in kept if len(own)])), merged, atol=1e-3, rtol=1e-3
    )
    again = VisionStates()
    with backbone.record(again, keep=True, inputs=False):
        backbone.encode(states.inputs[0])
    assert all(map(torch.equal, again.keys + again.values, states.keys + states.values))
    assert backbone.decoder is base.model.model.language_model
    assert (backbone.merge, backbone.packs, LlavaOneVision15.matches(base.model)) == (4, False, True)


def test_checkpoints_with_their_own_code(tmp_path: Path) -> None:
    """Their classes are found as those of causal language models."""
    base = rice()
    base.model.save_pretrained(tmp_path)
    base.processor.save_pretrained(tmp_path)
    model, processor, name = load_base(model=str(tmp_path), trust_remote_code=True)
    assert (name, type(model)) == ("llava_onevision1_5", type(base.model))
    assert model.lm_head.weight.equal(base.model.lm_head.weight)
    again = Base(model, processor)
    memory = again.attach(config(trigger="schedule:1=short,4=long"))
    again.generate(*QUESTIONS)
    assert len(memory.trace) == 2 * len(QUESTIONS)


@pytest.mark.parametrize("backbone", [None, "llava_onevision1_5"])
def test_nobodys_code_runs_unasked(tmp_path: Path, backbone: str | None) -> None:
    about = {"model_type": "brings_its_own", "auto_map": {"AutoConfig": "own.Config", "AutoProcessor": "own.Processor"}}
    (tmp_path / "config.json").write_text(json.dumps(about))
    (tmp_path / "processor_config.json").write_text(json.dumps(about))
    (tmp_path / "own.py").write_text("raise SystemExit('ran')")
    with pytest.raises(AttachError) as caught:
        load_base(backbone, str(tmp_path))
    assert str(caught.value) == (
        f"{tmp_path}: brings its own code, which would run on this machine; pass --trust-remote-code to allow it"
    )
