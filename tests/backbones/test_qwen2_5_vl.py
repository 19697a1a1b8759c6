"""Qwen2.5-VL: what VisMem knows of the family, against a dense computation from patch coordinates."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from bases import QUESTIONS, Base, mini, tied
from reference import encode, prompt_positions
from torch import Tensor

from vismem_backbones.qwen2_5_vl import Qwen2_5_VL
from vismem_core.base.vision import VisionStates

PICTURES = [(32, 32), (48, 32), (16, 40), (24, 56), (8, 8)]


@pytest.fixture(params=[tied, mini], ids=lambda make: make.__name__)
def backbone(request: pytest.FixtureRequest) -> Qwen2_5_VL:
    base: Base = request.param()
    return Qwen2_5_VL(base.model, base.processor)


def pixels(backbone: Qwen2_5_VL, sizes: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    scale = backbone.visual.patch_size // 4  # mini's patches are larger
    images = [tiny.picture(width * scale, height * scale, at) for at, (width, height) in enumerate(sizes)]
    batch = backbone.processor.image_processor(images, return_tensors="pt")
    return batch["pixel_values"], batch["image_grid_thw"]


@torch.no_grad()
def test_carry(backbone: Qwen2_5_VL) -> None:
    """Extra tokens see all patches of their row's images in every block; the patches do not see them."""
    values, grids = pixels(backbone, PICTURES)
    plain = backbone.visual(values, grid_thw=grids).pooler_output
    states = VisionStates()
    with backbone.record(states, keep=True, inputs=True):
        recorded = backbone.visual(values, grid_thw=grids).pooler_output
    assert recorded.equal(plain)
    assert states.patches == grids.prod(-1).tolist()
    assert states.tokens == [count // 4 for count in states.patches]
    states.rows = [[0], [1, 2], [], [3, 4]]
    extra = torch.randn(4, 6, backbone.vision_width)
    carried = backbone.carry(extra, states, [0, 1, 2, 3])
    pieces = values.split(states.patches)
    for row, images in enumerate(states.rows):
        own = torch.cat([pieces[image] for image in images]) if images else values[:0]
        grid = [grids[image].tolist() for image in images]
        patches = backbone.visual.patch_embed(own) if images else torch.zeros(0, backbone.vision_width)
        seen, expected = encode(backbone.visual, backbone.visual, patches, grid, extra[row])
        torch.testing.assert_close(carried[row], expected, atol=1e-4, rtol=1e-4)
        if images:  # the reference is right about the patches themselves
            merged = torch.cat([plain.split(states.tokens)[image] for image in images])
            torch.testing.assert_close(backbone.visual.merger(seen), merged, atol=1e-3, rtol=1e-3)
    again = backbone.carry(extra[[3, 1]], states, [3, 1])
    torch.testing.assert_close(again, carried[[3, 1]], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_inputs_can_be_encoded_again(backbone: Qwen2_5_VL) -> None:
    first, again = VisionStates(), VisionStates()
    with backbone.record(first, keep=True, inputs=True):
        for sizes in (PICTURES[:2], PICTURES[2:]):  # two calls, as for images and videos
            values, grids = pixels(backbone, sizes)
            backbone.visual(values, grid_thw=grids)
    with backbone.record(again, keep=True, inputs=False):
        for inputs in first.inputs:
            backbone.encode(inputs)
    assert again.patches == first.patches
    assert all(map(torch.equal, again.keys + again.values, first.keys + first.values))
    quiet = VisionStates()
    with backbone.record(quiet, keep=False, inputs=False):
        backbone.encode(first.inputs[0])
    assert (quiet.keys, quiet.inputs, len(quiet.patches)) == ([], [], 2)
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in backbone.visual.modules()]
    assert sum(hooks) == 0


@torch.no_grad()
def test_project_is_the_models_own_merger(backbone: Qwen2_5_VL) -> None:
    tokens = torch.randn(3, 8, backbone.vision_width)
    got = backbone.project(tokens)
    assert got.shape == (3, 8 // backbone.merge, backbone.width)
    for row in range(3):
        torch.testing.assert_close(got[row], backbone.visual.merger(tokens[row]))


def test_positions_are_generates(backbone: Qwen2_5_VL) -> None:
    base = Base(backbone.model, backbone.processor)
    inputs = base.inputs(*QUESTIONS)
    positions = backbone.positions(inputs)
    assert positions.shape == (4, *inputs["input_ids"].shape)
    for row, question in enumerate(QUESTIONS):
        alone = base.inputs(question)
        length = alone["input_ids"].shape[1]
        assert positions[1:, row, -length:].equal(prompt_positions(base.model, alone)[:, 0])
        assert positions[0, row, -length:].tolist() == list(range(length))


def test_anatomy(backbone: Qwen2_5_VL) -> None:
    model = backbone.model
    text, vision = model.config.text_config, model.config.vision_config
    assert backbone.decoder is model.model.language_model
    assert backbone.embeddings is model.model.language_model.embed_tokens
    assert backbone.head is model.lm_head
    assert (backbone.width, backbone.vision_width, backbone.merge) == (text.hidden_size, vision.hidden_size, 4)
    assert Qwen2_5_VL.matches(model)
    assert (backbone.dtype, backbone.vision_dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_inputs_are_left_padded_whatever_the_tokenizer_says(padding_side: str) -> None:
    base = tied()
    base.processor.tokenizer.padding_side = padding_side
    inputs = base.inputs(*QUESTIONS)
    assert inputs["attention_mask"][:, -1].all()
    assert not inputs["attention_mask"].all()


@torch.no_grad()
def test_continue_on_a_cache_equals_one_pass(backbone: Qwen2_5_VL) -> None:
    embeds = torch.randn(2, 9, backbone.width)
    positions, mask = torch.arange(9).expand(3, 2, 9), torch.ones(2, 9)
    whole = copy.deepcopy(backbone).continue_(embeds, mask, positions, None)
    from transformers import DynamicCache

    cache = DynamicCache()
    pieces = [
        backbone.continue_(embeds[:, begin:end], mask[:, :end], positions[..., begin:end], cache)
        for begin, end in ((0, 5), (5, 9))
    ]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-4, rtol=1e-4)
