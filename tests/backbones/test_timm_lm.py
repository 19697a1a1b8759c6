"""Composed models: what they are made of, that they come back as they were saved, and what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import tiny
import torch
import towers
from bases import QUESTIONS, Base, config
from PIL import Image
from timm.data import create_transform, resolve_data_config
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlavaProcessor,
    PerceptionLMProcessor,
    PerceptionLMVideoProcessor,
)

import vismem_core as vismem
from vismem_backbones.compose import compose
from vismem_backbones.timm_lm import TimmLM
from vismem_core.base.loading import load_base
from vismem_core.base.vision import VisionStates
from vismem_core.errors import AttachError

VIT = "vit_tiny_patch16_224"
SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}
TEMPLATE = "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }} {% endfor %}"


def language(kind: str = "llama", **options: Any) -> tuple[Any, Any]:
    """A random language model whose tokenizer knows no images."""
    words = tiny._tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": None, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    settings = {"vocab_size": len(words), "head_dim": 8, **sizes, **ends, "num_key_value_heads": 2} | options
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).eval(), words


def composed(kind: str = "llama", encoder: dict[str, Any] | None = None, pooling: int = 1, **options: Any) -> Base:
    lm, words = language(kind, **options)
    arguments = SIZES | (encoder or {})
    return Base(*compose(VIT, lm, tokenizer=words, pretrained=False, pooling=pooling, **arguments))


OTHERS: dict[str, dict[str, Any]] = {
    "resnet18": {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32), "img_size": 70},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32), "img_size": 64},
    "eva02_tiny_patch14_224": {"depth": 1, "img_size": 42},
}
"""Encoders that are no plain Vision Transformer: images of 3 x 3, 2 x 2 and 3 x 3 tokens."""


def other(name: str) -> Base:
    lm, words = language()
    return Base(*compose(name, lm, tokenizer=words, pretrained=False, **OTHERS[name]))


@pytest.mark.parametrize(
    ("kind", "tied", "encoder", "pooling"),
    [
        ("llama", False, {}, 2),
        ("qwen2", True, {"reg_tokens": 4}, 1),
        ("phi3", False, {"class_token": False, "global_pool": "map"}, 1),
    ],
)
def test_what_is_saved_comes_back(tmp_path: Path, kind: str, tied: bool, encoder: dict[str, Any], pooling: int) -> None:
    base = composed(kind, encoder, pooling, tie_word_embeddings=tied)
    assert (base.model.lm_head.weight is base.model.get_input_embeddings().weight) is tied
    base.model.save_pretrained(tmp_path)
    base.processor.save_pretrained(tmp_path)
    model, processor, name = load_base(model=str(tmp_path))
    assert (name, type(model), type(processor)) == ("timm_lm", type(base.model), type(base.processor))
    again, options = Base(model, processor), {"eos_token_id": None, "pad_token_id": 0}
    ours, theirs = base.generate(*QUESTIONS, **options), again.generate(*QUESTIONS, **options)
    assert ours.sequences.equal(theirs.sequences)
    assert all(map(torch.equal, ours.logits, theirs.logits))
    memory = again.attach(config(trigger="schedule:1=short,4=long"))
    again.generate(*QUESTIONS, **options)
    assert len(memory.trace) == 2 * len(QUESTIONS)


@pytest.mark.parametrize("name", OTHERS)
def test_memory_behind_any_encoder(tmp_path: Path, name: str) -> None:
    """Short memory is formed of the visual tokens there; a trained step leaves even running averages as they were."""
    base = other(name)
    base.model.save_pretrained(tmp_path)
    base.processor.save_pretrained(tmp_path)
    model, processor, backbone = load_base(model=str(tmp_path))
    assert backbone == "generic"
    again, options = Base(model, processor), {"eos_token_id": None, "pad_token_id": 0}
    ours, theirs = base.generate(*QUESTIONS, **options), again.generate(*QUESTIONS, **options)
    assert ours.sequences.equal(theirs.sequences)
    assert all(map(torch.equal, ours.logits, theirs.logits))
    with pytest.warns(UserWarning, match="short memory is formed of"):
        memory = again.attach(config(trigger="schedule:1=short,4=long"))
    again.generate(*QUESTIONS, **options)
    assert len(memory.trace) == 2 * len(QUESTIONS)
    before = {key: own.clone() for key, own in model.state_dict().items()}
    policy = vismem.trainable(memory).train()
    rows = [{"prompt": "a ?", "image": tiny.picture(30, 20, seed), "answer": "<ms_I><ms_E> four"} for seed in range(2)]
    policy(**vismem.collate(memory, rows)).loss.backward()
    assert all(parameter.grad is not None for parameter in memory.short.parameters())
    assert all(map(torch.equal, before.values(), model.state_dict().values()))


@torch.no_grad()
@pytest.mark.parametrize(("name", "side"), [("resnet18", 3), ("convnext_atto", 2)])
def test_places_of_a_map_are_tokens(name: str, side: int) -> None:
    base = other(name)
    sizes = {key: own for key, own in OTHERS[name].items() if key != "img_size"}
    net = timm.create_model(name, num_classes=0, **sizes).eval()
    net.load_state_dict(base.model.model.vision_tower.timm_model.state_dict())
    inputs = base.inputs(("?", [tiny.picture(64, 64, 0)]))
    seen = net.forward_features(inputs["pixel_values"])
    assert seen.shape == (1, 32, side, side)
    assert base.model.config.image_seq_length == side * side
    rows = torch.stack([seen[0, :, at // side, at % side] for at in range(side * side)])
    projector = base.model.model.multi_modal_projector
    expected = projector.linear_2(torch.nn.functional.gelu(projector.linear_1(rows)))
    made = towers.features(base.model.model, inputs).pooler_output
    torch.testing.assert_close(made[0], expected)


def test_a_language_model_from_a_folder(tmp_path: Path) -> None:
    lm, words = language()
    words.chat_template = TEMPLATE
    words.init_kwargs.pop("padding_side")  # few language models come with any, which is the right side
    lm.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    base = Base(*compose(VIT, tmp_path, pretrained=False, **SIZES))
    base.processor.save_pretrained(tmp_path / "composed")
    assert LlavaProcessor.from_pretrained(tmp_path / "composed").tokenizer.padding_side == "left"
    assert base.model.get_input_embeddings().weight[: len(words)].equal(lm.get_input_embeddings().weight)
    message = [{"type": "image"}, {"type": "text", "text": "a {boot} ?"}]
    chat = [{"role": "system", "content": "see"}, {"role": "user", "content": message}]
    # The language model's own template, around the parts of each message.
    assert base.processor.apply_chat_template(chat) == "[system] see [user] <image>\na {boot} ? "


@torch.no_grad()
@pytest.mark.parametrize(("encoder", "dropped"), [({}, 1), ({"class_token": False, "global_pool": "avg"}, 0)])
def test_features_are_the_encoders_own(encoder: dict[str, Any], dropped: int) -> None:
    base = composed(encoder=encoder)
    vit = timm.create_model(VIT, num_classes=0, **SIZES, **encoder).eval()
    vit.load_state_dict(base.model.model.vision_tower.timm_model.state_dict())
    images = torch.randn(3, 1, 3, 16, 16)
    projector = base.model.model.multi_modal_projector
    seen = vit.forward_features(images[:, 0])[:, dropped:]
    expected = projector.linear_2(torch.nn.functional.gelu(projector.linear_1(seen)))
    torch.testing.assert_close(base.model.model.get_image_features(images).pooler_output, expected)


@torch.no_grad()
def test_without_images_it_is_the_language_model() -> None:
    lm, words = language("qwen2", tie_word_embeddings=True)
    ids = torch.arange(20)[None]
    before = lm(input_ids=ids).logits
    model, _ = compose(VIT, lm, tokenizer=words, pretrained=False, **SIZES)
    torch.testing.assert_close(model(input_ids=ids).logits[..., : before.shape[-1]], before)


def test_images_enter_as_the_encoder_was_trained() -> None:
    """Of a square image of its size, where nothing is cropped, they are what timm's own transform gives."""
    base = composed()
    data = resolve_data_config({}, model=base.model.model.vision_tower.timm_model) | {"crop_pct": 1.0}
    image = tiny.picture(16, 16, 0)
    expected = create_transform(**data | {"input_size": (3, 16, 16)}, is_training=False)(image)
    torch.testing.assert_close(base.inputs(("?", [image]))["pixel_values"][0, 0], expected)
    squashed = base.inputs(("?", [image.resize((16, 64), Image.Resampling.NEAREST)]))["pixel_values"]
    assert squashed.shape == (1, 1, 3, 16, 16)


@torch.no_grad()
@pytest.mark.parametrize(("side", "pooling", "tokens"), [(20, 2, 4), (20, 1, 25), (24, 3, 4)])
def test_sides_that_pooling_does_not_divide(side: int, pooling: int, tokens: int) -> None:
    base = composed(encoder={"img_size": side}, pooling=pooling)
    backbone, inputs = TimmLM(base.model, base.processor), base.inputs(("?", [tiny.picture(9, 9, 0)]))
    states = VisionStates()
    with backbone.record(states, keep=True, inputs=False):
        made = towers.features(base.model.model, inputs).pooler_output
    assert states.tokens == [made.shape[1]] == [tokens]
    assert states.patches == [1 + (side // 4) ** 2] == [len(states.keys[0])]


@torch.no_grad()
def test_tiles_and_videos_of_perception_lm() -> None:
    """With its own processor an image is a thumbnail and tiles; images come before videos."""
    words = tiny._tokenizer(image_token="<image>", video_token="<video>")
    words.add_special_tokens({"additional_special_tokens": ["<image>", "<video>"]})
    model, plain = tiny.timm_lm(video_token_id=words.video_token_id)
    model.resize_token_embeddings(len(words))
    model.config.image_token_id = words.image_token_id
    images = plain.image_processor
    images.vision_input_type, images.max_num_tiles = "thumb+tile", 4
    videos = PerceptionLMVideoProcessor(size={"height": 16, "width": 16})
    processor = PerceptionLMProcessor(videos, images, words, patch_size=4, pooling_ratio=1)
    backbone = TimmLM(model, processor)
    assert backbone.placeholders == {"image": words.image_token_id, "video": words.video_token_id}
    film = np.stack([np.asarray(tiny.picture(16, 16, seed)) for seed in range(3)])
    inputs = processor(
        text=["<video> ?", "<image> what ?"],
        images=[[tiny.picture(30, 14, 5)]],
        videos=[film],
        padding=True,
        return_tensors="pt",
        do_sample_frames=False,
    )
    states = VisionStates()
    with backbone.record(states, keep=True, inputs=False):
        model(**inputs)
    states.assign([(inputs["input_ids"] == token).sum(-1).tolist() for token in backbone.placeholders.values()])
    tiles = inputs["pixel_values"].shape[1]
    assert tiles > 2
    assert states.rows == [list(range(tiles, tiles + 3)), list(range(tiles))]


@pytest.mark.parametrize(
    ("encoder", "options", "reason"),
    [
        ("vit_tiny_patch16_223", {}, "timm has no model 'vit_tiny_patch16_223'; did you mean 'vit_tiny_patch16_224'?"),
        ("swin_tiny_patch4_window7_224", {}, "it gives features (7, 7, 768), and they are to be (chan"),
        ("hiera_tiny_224", {}, "its last tokens are not as wide as its first"),
        ("coat_tiny", {}, "it gives neither a row of tokens nor a map of features"),
        ("mixer_s32_224", {}, "it does not take its own width"),
        ("resnet18", {"img_size": (32, 64)}, "its images are not square"),
        ("resnet18", {"pooling": 2}, "gives a map of features, which cannot be pooled: use pooling=1"),
        (VIT, {"img_size": (16, 32)}, "its images are not square"),
        (VIT, {"depth": "two"}, "cannot be made"),
        (VIT, {"reg_tokens": 4, "pooling": 2}, "has register tokens, which cannot be pooled: use pooling=1"),
    ],
)
def test_encoders_that_do_not_fit(encoder: str, options: dict[str, Any], reason: str) -> None:
    lm, words = language()
    sizes = SIZES if encoder == VIT else {}
    with pytest.raises(AttachError) as caught:
        compose(encoder, lm, tokenizer=words, pretrained=False, **sizes | options)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("gemma2", {"final_logit_softcapping": 1e-3}, "makes its logits by more than one linear layer"),
        ("cohere", {"logit_scale": 0.1}, "makes its logits by more than one linear layer"),
        ("gpt2", {"n_embd": 32, "n_layer": 1, "n_head": 4}, "ties its head to embeddings that are not named"),
        ("bart", {"d_model": 32, "decoder_layers": 1, "decoder_ffn_dim": 32}, "ties its head to embeddings"),
    ],
)
def test_language_models_that_do_not_fit(kind: str, options: dict[str, Any], reason: str) -> None:
    lm, words = language(kind, **options)
    with pytest.raises(AttachError, match=reason):
        compose(VIT, lm, tokenizer=words, pretrained=False, **SIZES)


def test_a_language_model_is_loaded_in_its_precision_and_not_cast(tmp_path: Path) -> None:
    """``to(dtype)`` rounds the frequencies of rotary embeddings too, which composed models have in float32."""
    lm, words = language(initializer_range=1.0)
    lm.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert compose(VIT, loaded, tokenizer=words, pretrained=False, **SIZES)[0].dtype == torch.bfloat16
    with pytest.raises(AttachError, match="load it with dtype=, do not cast it"):
        compose(VIT, lm.to(torch.bfloat16), tokenizer=words, pretrained=False, **SIZES)


def test_a_model_needs_its_tokenizer() -> None:
    with pytest.raises(AttachError, match="needs tokenizer="):
        compose(VIT, language()[0], pretrained=False, **SIZES)


def test_memory_on_encoders_that_are_not_known() -> None:
    """The adapter by name refuses them; the generic one, which is found, does not need to know their blocks."""
    for name, arguments, why in (
        ("eva02_tiny_patch14_224", {"depth": 1}, "it is a Eva"),
        (VIT, SIZES | {"attn_layer": "diff"}, "its blocks are Block with DiffAttention"),
    ):
        model, processor = tiny.timm_lm()
        assert TimmLM.matches(model)
        model.model.vision_tower.timm_model = timm.create_model(name, num_classes=0, **arguments)
        assert not TimmLM.matches(model)
        with pytest.raises(AttachError, match=f"memory cannot work with timm's '{VIT}': {why}"):
            TimmLM(model, processor)
