"""Encoders that take tiles: what VisMem records and carries, against the models' own blocks run again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
import towers
from bases import Base, Question
from torch import Tensor, nn

from vismem_backbones.tiles import Tiles
from vismem_core.base.families import find_backbone
from vismem_core.base.vision import VisionStates

QUESTIONS: list[Question] = [
    ("left ?", [tiny.picture(40, 20, 0)]),
    ("a bag , a coat .", [tiny.picture(16, 16, 1), tiny.picture(12, 50, 2)]),
    ("what is it ?", []),
    ("a boot ?", [tiny.picture(60, 60, 3)]),
]

MODELS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava": tiny.llava,
    "llava, two layers": lambda: tiny.llava(vision_feature_layer=[-1, 1]),
    "llava_next": tiny.llava_next,
    "llava_next, two layers": lambda: tiny.llava_next(vision_feature_layer=[0, -2]),
    "llava_onevision": tiny.llava_onevision,
    "internvl": tiny.internvl,
    "internvl, layer -2": lambda: tiny.internvl(vision_feature_layer=-2),
    "internvl, as 6B": lambda: tiny.internvl(vision={"use_qk_norm": True, "norm_type": "rms_norm"}),
    "timm_lm": tiny.timm_lm,
    "timm_lm, as SigLIP": lambda: tiny.timm_lm(vision={"class_token": False, "global_pool": "map"}),
    "timm_lm, as DINOv2": lambda: tiny.timm_lm(vision={"reg_tokens": 4, "init_values": 0.5, "no_embed_class": True}),
    "timm_lm, as CLIP": lambda: tiny.timm_lm(vision={"pre_norm": True, "act_layer": "quick_gelu"}),
    "timm_lm, norms": lambda: tiny.timm_lm(vision={"qk_norm": True, "scale_attn_norm": True, "final_norm": False}),
    "timm_lm, pooled": lambda: tiny.timm_lm(pooling=2),
    "internvl, last norm": lambda: tiny.internvl(vision={"use_mean_pooling": False}),
}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def backbone(request: pytest.FixtureRequest) -> Tiles:
    model, processor = request.param()
    with torch.no_grad():  # all ones and zeros in a fresh model, so that nobody would miss them
        for name, own in model.model.vision_tower.named_parameters():
            if "norm" in name or "lambda" in name or "gamma" in name:
                own.add_(0.3 * torch.randn_like(own))
    return find_backbone(model)(model, processor)  # type: ignore[return-value]


def seen(backbone: Tiles, *questions: Question) -> tuple[VisionStates, Any]:
    """What is recorded while the model encodes the images of some questions, dealt to their rows, and the inputs."""
    states = VisionStates()
    inputs = Base(backbone.model, backbone.processor).inputs(*questions)
    with backbone.record(states, keep=True, inputs=True):
        if "pixel_values" in inputs:
            towers.features(backbone.model.model, inputs)
    states.assign([(inputs["input_ids"] == token).sum(-1).tolist() for token in backbone.placeholders.values()])
    return states, inputs


def again(backbone: Tiles, tiles: Tensor, extra: Tensor) -> Tensor:
    """The encoder's own blocks over all tiles of a row and extra tokens, as one sequence under a mask.

    Args:
        tiles: (tiles, T, D), what enters the first block.
        extra: (E, D)

    Returns:
        (E, D), as the projector gets them.
    """
    count, length = tiles.shape[:2]
    groups = torch.arange(count).repeat_interleave(length)
    mask = torch.zeros(count * length + len(extra), count * length + len(extra))
    mask[: count * length, : count * length][groups[:, None] != groups] = float("-inf")
    mask[: count * length, count * length :] = float("-inf")

    def masked(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return args, kwargs | {"attention_mask": mask[None, None]}

    tower, config = backbone.model.model.vision_tower, backbone.model.config
    states = [torch.cat([tiles.flatten(0, 1), extra])[None]]
    if config.model_type == "perception_lm":
        for block in towers.stack(tower):
            states.append(block(states[-1], attn_mask=mask))
        return tower.timm_model.norm(states[-1])[0, count * length :]
    for block in towers.stack(tower):
        attention = getattr(block, "self_attn", None) or block.attention
        handle = attention.register_forward_pre_hook(masked, with_kwargs=True)
        states.append(block(states[-1], attention_mask=None) if hasattr(block, "self_attn") else block(states[-1]))
        handle.remove()
    layers = config.vision_feature_layer
    if config.model_type == "internvl" and layers == -1:
        states[-1] = tower.layernorm(states[-1])
    out = torch.cat([states[layer][0] for layer in ([layers] if isinstance(layers, int) else layers)], dim=-1)
    return out[count * length :]


@torch.no_grad()
def test_carry(backbone: Tiles) -> None:
    """Extra tokens see all tiles of their row's images in every block; the patches do not see them."""
    states, _ = seen(backbone, *QUESTIONS)
    extra = torch.randn(4, 6, backbone.vision_width)
    carried = backbone.carry(extra, states, [0, 1, 2, 3])
    for row, question in enumerate(QUESTIONS):
        inputs = Base(backbone.model, backbone.processor).inputs(question)
        tiles = towers.entering(backbone.model.model, inputs) if question[1] else torch.zeros(0, 1, extra.shape[-1])
        torch.testing.assert_close(carried[row], again(backbone, tiles, extra[row]), atol=1e-4, rtol=1e-4)
        _, written_out = towers.encode(backbone.model, backbone.model, inputs, extra[row])
        torch.testing.assert_close(carried[row], written_out, atol=1e-4, rtol=1e-4)
    some = backbone.carry(extra[[3, 1]], states, [3, 1])
    torch.testing.assert_close(some, carried[[3, 1]], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(carried[0], backbone.carry(extra[:1], states, [3])[0], atol=1e-2)


@torch.no_grad()
def test_tiles_belong_to_their_rows(backbone: Tiles) -> None:
    """A row has the keys that its images give alone, image by image and tile by tile."""
    states, inputs = seen(backbone, *QUESTIONS)
    starts = torch.tensor([0, *states.patches]).cumsum(0).tolist()
    assert sorted(tile for row in states.rows for tile in row) == list(range(len(states.patches)))
    counts = []
    for row, question in enumerate(QUESTIONS):
        alone, _ = seen(backbone, question)
        counts.append(len(alone.patches))
        mine = [place for tile in states.rows[row] for place in range(starts[tile], starts[tile + 1])]
        for block, keys in enumerate(alone.keys):
            torch.testing.assert_close(states.keys[block][mine], keys, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(states.values[block][mine], alone.values[block], atol=1e-5, rtol=1e-5)
        assert sum(alone.tokens) == sum(states.tokens[tile] for tile in states.rows[row])
    assert counts[2] == 0
    if backbone.name not in ("llava", "timm_lm"):
        assert len(set(counts)) > 2  # sizes make a difference
    placeholders = torch.stack([inputs["input_ids"] == token for token in backbone.placeholders.values()]).any(0)
    assert sum(states.tokens) == int(placeholders.sum())


@torch.no_grad()
def test_inputs_can_be_encoded_again(backbone: Tiles) -> None:
    first, _ = seen(backbone, *QUESTIONS)
    again = VisionStates(rows=first.rows)
    with backbone.record(again, keep=True, inputs=False):
        for inputs in first.inputs:
            backbone.encode(inputs)
    assert again.patches == first.patches
    assert all(map(torch.equal, again.keys + again.values, first.keys + first.values))
    assert len(first.keys) == max(backbone.layers)
    quiet = VisionStates()
    with backbone.record(quiet, keep=False, inputs=False):
        backbone.encode(first.inputs[0])
    assert (quiet.keys, quiet.inputs, quiet.patches) == ([], [], first.patches)


@torch.no_grad()
def test_recording_leaves_nothing_behind(backbone: Tiles) -> None:
    model = backbone.model.model
    inputs = Base(backbone.model, backbone.processor).inputs(*QUESTIONS)
    plain = towers.features(model, inputs).pooler_output

    def everything() -> list[Any]:
        hooks = [(name, len(own._forward_hooks), len(own._forward_pre_hooks)) for name, own in model.named_modules()]
        return [hooks, sorted(vars(model))]

    before = everything()
    with backbone.record(VisionStates(), keep=True, inputs=True):
        recorded = towers.features(model, inputs).pooler_output
    assert all(map(torch.equal, plain, recorded))
    with pytest.raises(RuntimeError), backbone.record(VisionStates(), keep=True, inputs=True):
        raise RuntimeError
    assert everything() == before


@torch.no_grad()
def test_what_carry_gives_is_what_the_projector_takes(backbone: Tiles) -> None:
    tokens = torch.randn(3, 2 * backbone.merge, len(backbone.layers) * backbone.vision_width)
    projected = backbone.project(tokens)
    assert projected.shape == (3, 2, backbone.width)
    for row in range(3):
        expected = towers.project(backbone.model, tokens[row])
        torch.testing.assert_close(projected[row], expected, atol=1e-4, rtol=1e-4)


def test_adapters_sit_where_they_are_trained(backbone: Tiles) -> None:
    """No adapter on a block behind the features, and one on every block before."""
    base = Base(backbone.model, backbone.processor)
    memory = base.attach()
    adapters = memory.short.adapter_parameters()
    targets = 1 if backbone.name == "timm_lm" else 2  # qkv, or q_proj and v_proj
    assert len(adapters) == 2 * targets * max(backbone.layers)
    memory.trigger = "schedule:0=short"
    inputs = base.inputs(*QUESTIONS)
    with backbone.record(states := VisionStates(), keep=True, inputs=False):
        towers.features(backbone.model.model, inputs)
    states.assign([(inputs["input_ids"] == token).sum(-1).tolist() for token in backbone.placeholders.values()])
    with memory.short.adapter.on():  # type: ignore[attr-defined]
        carried = backbone.carry(torch.randn(4, 6, backbone.vision_width), states, [0, 1, 2, 3])
    carried.square().sum().backward()
    assert all(own.grad is not None and own.grad.abs().sum() > 0 for own in adapters.values())
    long = {name.rpartition(".lora")[0] for name in memory.long.adapter_parameters()}
    assert len(long) == 2 * backbone.model.config.text_config.num_hidden_layers


def test_anatomy(backbone: Tiles) -> None:
    model = backbone.model
    text, vision = model.config.text_config, model.config.vision_config
    assert backbone.decoder is model.model.language_model
    assert backbone.embeddings is model.model.language_model.embed_tokens
    assert backbone.head is model.lm_head
    assert (backbone.width, backbone.vision_width) == (text.hidden_size, vision.hidden_size)
    assert (backbone.dtype, backbone.vision_dtype) == (torch.float32, torch.float32)
    assert backbone.positions(Base(model, backbone.processor).inputs(*QUESTIONS)).ndim == 2


def test_packing_is_for_language_models_that_are_known_to_take_it() -> None:
    for language, packs in (("llama", True), ("phi3", False), ("mistral", True)):
        model, processor = tiny.llava()
        model.config.text_config.model_type = language
        assert find_backbone(model)(model, processor).packs is packs
    model.config.text_config.sliding_window = 32
    assert not find_backbone(model)(model, processor).packs


def test_encoders_that_are_not_known() -> None:
    model, _ = tiny.llava()
    model.config.vision_config.model_type = "pixtral"
    assert find_backbone(model).name == "generic"
