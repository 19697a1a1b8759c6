"""Tiny random models of every image-text-to-text type that transformers knows, from their default configurations."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import tiny
import torch
from PIL import Image
from torch import Tensor
from transformers import CONFIG_MAPPING, BatchFeature, FuyuImageProcessor, Qwen2VLImageProcessor
from transformers.models.auto.image_processing_auto import (
    IMAGE_PROCESSOR_MAPPING_NAMES,
    get_image_processor_class_from_name,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING as MODELS
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from vismem_core.base.backbone import head_of
from vismem_core.testing import liven

TYPES = tuple(sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES))
WIDTH, SIDE, PATCH = 32, 16, 4
SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "embed_dim", "d_model", "out_hidden_size", "projection_dim", "mm_hidden_size",
        "projector_hidden_size", "vision_hidden_size", "text_hidden_size", "vision_output_dim", "adapter_in_dim",
        "adapter_out_dim", "adapter_input_size", "codebook_dim"), WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "mlp_dim", "mlp_hidden_size", "hidden_dim",
        "encoder_ffn_dim", "decoder_ffn_dim", "intermediate_size_mlp", "dense_intermediate_size",
        "shared_intermediate_size"), 2 * WIDTH),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts"), 4),
    "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 4, "n_shared_experts": 1,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "first_k_dense_replace": 1,
    "n_group": 1, "topk_group": 1, "num_global_layers": 1, "max_position_embeddings": 2048,
    "sliding_window": 8, "sliding_window_size": 8, "attention_chunk_size": 16,  # fewer than a prompt has tokens
    "image_size": SIDE, "patch_size": PATCH, "tile_size": SIDE, "num_position_embeddings": 16,
}  # fmt: skip
DEPTHS = ("num_hidden_layers", "depth", "n_layers", "num_layers")
PLAIN = {"pixel_values", "pixel_mask", "pixel_values_local", "num_local_patches", "kwargs"}
"""Arguments of ``get_image_features`` that squares serve; others tell a model the shapes of images."""
SQUARE = ("height", "width")
PROCESSED: dict[str, Any] = {
    "min_pixels": 256, "max_pixels": 4096, "max_image_size": {"longest_edge": SIDE}, "max_soft_tokens": 70,
    "crop_size": dict.fromkeys(("height", "width"), SIDE), "image_grid_pinpoints": tiny.PINPOINTS,
    "min_image_tokens": 4, "max_image_tokens": 16, "do_image_splitting": False, "slice_mode": False,
    "scale_resolution": SIDE,
    "overlap_margins": [1, 1], "max_crops": 2, "spatial_factor": 4, "min_num_patches": 4, "max_num_patches": 16,
    "high_res_size": dict.fromkeys(("height", "width"), SIDE), "tile_size": SIDE, "min_size": 4,
}  # fmt: skip
"""Settings of image processors, where they have them."""
ALONE: dict[str, dict[str, Any]] = {
    "dots3_note": {"temporal_patch_size": 1},
    **{name: {"size": dict.fromkeys(SQUARE, 4 * PATCH)} for name in ("inkling2", "inkling2_loop")},
}
"""Settings of a type's image processor as its checkpoints have them, which no configuration tells."""
TYPED = ("mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids")
LIKE = {"diffusion_gemma": "gemma4"}
"""Types whose checkpoints come with another's image processor, which transformers does not map."""
MADE: dict[str, Callable[[], tuple[Any, Any]]] = {
    "qwen2_5_vl": tiny.qwen,
    "internvl": tiny.internvl,
    "llava": tiny.llava,
    "llava_next": tiny.llava_next,
    "llava_onevision": tiny.llava_onevision,
    "perception_lm": tiny.timm_lm,
}
IMAGE, VIDEO, START, END = "<image>", "<video>", "<start>", "<end>"
MARKS = {
    "image_token": IMAGE, "video_token": VIDEO, "eos": "<|im_end|>", "pad": "<|endoftext|>", "bos": "<|im_start|>",
    **dict.fromkeys(("vision_start", "image_start", "boi"), START),
    **dict.fromkeys(("vision_end", "image_end", "eoi"), END),
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e4}


def mrope(*section: int, **more: Any) -> dict[str, Any]:
    return text(rope_parameters=ROPE | {"mrope_section": list(section)} | more)


def text(**settings: Any) -> dict[str, Any]:
    return {f"text_config.{name}": own for name, own in settings.items()}


def vision(**settings: Any) -> dict[str, Any]:
    return {f"vision_config.{name}": own for name, own in settings.items()}


GLM = mrope(1, 1, 2, partial_rotary_factor=1.0)
DEEP = vision(deepstack_visual_indexes=[0])
MLA = {"num_key_value_heads": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "head_dim": 4,
       "kv_lora_rank": 16, "q_lora_rank": 16, "rope_parameters": ROPE}  # fmt: skip
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
INDEX = {"index_n_heads": 32, "index_head_dim": 8, "index_topk": 8}
"""As many heads as published: each scores no less than 0, and with a few of them many tokens tie there."""
SHARED = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
          "hidden_size_per_layer_input": 8}  # fmt: skip
"""Of the small gemmas: the last layers read keys and values of earlier ones, and tokens enter each layer by id."""
INKLING = text(n_layers_per_attn_res_block=1, swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=8,
    d_rel=4, rel_extent=16) | vision(projection_hidden_dim=WIDTH, patch_size=2 * PATCH)  # fmt: skip
MUSE = {"out_hidden_size": 4 * WIDTH} | vision(pos_emb_height=2, pos_emb_width=2)
"""Windows of 2 x 2 patches, and four patches to a token."""


def vq(**settings: Any) -> dict[str, Any]:
    return {
        f"vq_config.{name}": own
        for name, own in ({"base_channels": 32, "channel_multiplier": [1, 1]} | settings).items()
    }


OWN: dict[str, dict[str, Any]] = {
    "qwen2_vl": mrope(1, 1, 2),
    "qwen2_5_vl": mrope(1, 1, 2) | vision(fullatt_block_indexes=[1], window_size=16),
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe"), mrope(2, 1, 1, mrope_interleaved=True) | DEEP),
    **dict.fromkeys(("paddleocr_vl", "ernie4_5_vl_moe", "cosmos3_edge"), mrope(1, 1, 2)),
    **dict.fromkeys(
        ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"), mrope(1, 1, 2) | {"vision_start_token_id": START}
    ),
    **dict.fromkeys(("glm4v", "glm46v", "glmga", "glm_ocr", "glm4v_moe"), GLM),
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe"), text(**LINEAR)),
    **dict.fromkeys(("minicpmv4_6", "minicpm_ocr"),
        text(**LINEAR) | vision(insert_layer_id=0) | {"insert_layer_id": 0}),
    "minicpmv4_7": text(**LINEAR) | vision(insert_layer_id=0) | {"insert_layer_id": 0, "image_start_id": START,
        "image_end_id": END, "slice_start_id": "<0>", "slice_end_id": "<1>", "newline_id": "<2>"},
    "qwen4_exp": text(**LINEAR, indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=8,
        indexer_compress_ratio=4, hc_lowrank=8, ple_layer_ids=[1], ple_embed_dim=16, heads_per_ngram=2,
        ngram_vocab_size_base=64, make_ngram_vocab_size_divisible_by=4, split_ngram_parts=2,
        number_of_conv_states=3),
    "kimi_k25": text(**MLA) | vision(projection_hidden_size=4 * WIDTH) | {"projection_hidden_size": WIDTH},
    "gemma3": {"mm_tokens_per_image": 4},
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "gemma3n": text(**SHARED, laurel_rank=4, intermediate_size=[2 * WIDTH] * 4,
        activation_sparsity_pattern=[0.95, 0.95, 0.0, 0.0], vocab_size_per_layer_input=IMAGE)
        | vision(vocab_offset=IMAGE, vocab_size=4, hidden_size=2048,
            model_args={"channel_multiplier": 0.125, "msfa_output_resolution": 2})
        | {"vision_soft_tokens_per_image": 4, "audio_config.vocab_offset": "<0>", "audio_config.vocab_size": 32},
    "gemma4": text(**SHARED, use_double_wide_mlp=True, final_logit_softcapping=30.0,
        per_layer_config={1: {"head_dim": 16}, 3: {"head_dim": 16}}),
    "gemma4_unified": text(final_logit_softcapping=30.0) | vision(mm_embed_dim=WIDTH, output_proj_dims=WIDTH),
    "diffusion_gemma": text(num_experts=4, top_k_experts=4, moe_intermediate_size=16,
        final_logit_softcapping=30.0) | {"canvas_length": 16},
    "llama4": text(moe_layers=[0, 1]) | vision(intermediate_size=4 * WIDTH, vision_output_dim=64,
        projector_input_dim=64, projector_output_dim=64),
    "idefics2": text(sliding_window=16) | {f"perceiver_config.{name}": own for name, own in {"resampler_n_latents": 8,
        "resampler_depth": 2, "resampler_n_heads": 4, "resampler_head_dim": 8}.items()},
    "inkling_mm_model": vision(n_layers=4, num_hidden_layers=4),  # no fewer than its patches have scales
    "nemotron_h_omni": text(mamba_num_heads=4, mamba_head_dim=8, n_groups=2, ssm_state_size=8, chunk_size=8,
        moe_shared_expert_intermediate_size=16),
    "lfm2_vl": text(layer_types=["conv", "full_attention"]),
    "cohere2_vision": {"alignment_intermediate_size": 2 * WIDTH},
    "janus": vq(num_embeddings=64),
    "llava_next_video": {"image_grid_pinpoints": tiny.PINPOINTS},
    "vipllava": {"vision_feature_layers": [-2, -1]},
    "cosmos3_omni": DEEP,
    "hunyuan_vl": mrope(1, 1, 1, 1) | text(head_dim=8),
    "cohere_compass": text(rope_parameters={"full_attention": ROPE}),
    "step3p7": vision(image_size=2 * SIDE) | text(sliding_window=8, num_sliding_attention_heads=8,
        layer_types=["full_attention", "sliding_attention"], mlp_layer_types=["dense", "sparse"],
        rope_parameters={"full_attention": ROPE, "sliding_attention": ROPE}),
    "glm5_next": text(**INDEX, num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=16, v_head_dim=16, head_dim=0,
        qk_nope_head_dim=16, linear_head_dim=16, linear_num_heads=2, index_kpool=4),
    "deepseek_vl_hybrid": {"high_res_vision_config.global_attn_indexes": [0], "high_res_vision_config.window_size": 3,
        "high_res_vision_config.output_channels": 16},
    "deepseek_ocr2": text(num_experts_per_tok=4, mlp_layer_types=["dense", "sparse"], n_group=1, topk_group=1,
        num_key_value_heads=4) | {f"vision_config.sam_config.{name}": own for name, own in {"image_size": 2 * SIDE,
        "window_size": 3, "output_channels": 16, "global_attn_indexes": [1], "downsample_channels": [16, WIDTH]
        }.items()},
    "unlimited_ocr": text(num_experts_per_tok=4, num_key_value_heads=4) | {f"vision_config.sam_config.{name}": own
        for name, own in {"image_size": 2 * SIDE, "window_size": 3, "output_channels": 16, "global_attn_indexes": [1],
        "downsample_channels": [16, WIDTH]}.items()},
    "molmo2": text(vocab_size=IMAGE, additional_vocab_size=36) | {"image_patch_id": IMAGE,
        "adapter_config.vision_feature_layer": [1, 0]},
    "muse_glimmer": MUSE,
    "muse_spark": MUSE | {"audio_config.hidden_sizes": [8, WIDTH], "audio_config.depths": [1, 1]},
    "minimax_m3_vl": text(layer_types=["full_attention", "minimax_m3_sparse"], mlp_layer_types=["dense", "sparse"],
        rotary_dim=4, index_n_heads=2, index_head_dim=8, index_block_size=4, index_topk_blocks=2),
    "mllama": text(num_hidden_layers=3, cross_attention_layers=[1]) | vision(vision_output_dim=64,
        intermediate_layers_indices=[0], num_global_layers=1),
    "granite4_vision": text(num_hidden_layers=6, embedding_multiplier=3.0) | vision(hidden_size=2 * WIDTH) | {
        "downsample_rate": "1/2", "deepstack_layer_map": [[-2, 1], [-1, 0]], "spatial_target_layers": [2, 3, 4, 5],
        "image_grid_pinpoints": tiny.PINPOINTS},
    "apertus1p5": vision(codebook_size=8, spatial_scale_factor=4, base_channels=32, channel_multiplier=[1, 1, 1]) | {
        "image_token_offset": "<0>", "audio_token_offset": "<8>", "audio_config.codebook_size": 8},
    "aria": text(moe_num_experts=4, moe_topk=4) | {"projector_patch_to_query_dict": {16: 4}},
    "chameleon": vq(num_embeddings=8, latent_channels=WIDTH, resolution=SIDE, channel_multiplier=[1, 1, 1]) | {
        "vocabulary_map": {IMAGE: IMAGE} | {f"IMGIMG{name}Z": f"<{at}>" for at, name in enumerate("ABCDEFGH")}},
    "emu3": vq(codebook_size=8, channel_multiplier=[1, 1, 1]) | {"vocabulary_map":
        {IMAGE: IMAGE, "<|extra_200|>": "<8>"} | {f"<|visual token {at:06}|>": f"<{at}>" for at in range(8)}},
    "dots3_note": text(**MLA | INDEX | {"head_dim": 12, "rope_parameters": dict.fromkeys(
        ("sliding_attention", "indexed_attention"), ROPE)}, per_layer_config={2: {"num_attention_heads": 2,
        "num_key_value_heads": 2, "kv_lora_rank": 32, "qk_nope_head_dim": 8}})
        | vision(per_layer_config={1: {"num_local_experts": 4, "num_experts_per_tok": 2}}),
    "inkling2": INKLING,
    "inkling2_loop": INKLING | text(loop_layer_index_start=1, loop_layer_index_end=3, loop_num_passes=2,
        head_dim=32, swa_head_dim=32, num_hidden_layers=4,
        layer_types=["hybrid_sliding", "hybrid_sliding", "hybrid", "hybrid_sliding"]),
    "mistral_large4": text(**MLA, **INDEX, kv_source_layers=[0, 1, 2]),
    "hy_v4_vl": text(**MLA | INDEX | {"qk_rope_head_dim": 8, "index_head_dim": 16,
        "rope_parameters": ROPE | {"mrope_section": [2, 1, 1]}}),
    "fast_vlm": vision(hidden_size=64, image_size=128, model_args={"inference_mode": True, "layers": [1] * 5,
        "embed_dims": [WIDTH] * 5}),
    "paligemma": vision(num_image_tokens=16),
    "ovis2": vision(hidden_stride=2, vocab_size=40),
    "internvl": vision(image_size=[SIDE, SIDE], patch_size=[PATCH, PATCH]),
}  # fmt: skip


def shrunk(settings: dict[str, Any], ids: dict[str, int], words: int) -> dict[str, Any]:
    """A configuration with small sizes everywhere, one layer of each kind it has, and ids of a small vocabulary."""
    small: dict[str, Any] = {}
    depth = next((settings[name] for name in DEPTHS if isinstance(settings.get(name), int)), 0)
    kept = _kinds(settings, depth)
    for name, own in settings.items():
        if not isinstance(name, str) or name in ("id2label", "label2id", "transformers_version"):
            continue
        if name == "per_layer_config":
            small[name] = {at: _scaled(own[key], settings) for at, layer in enumerate(kept)
                           for key in own if int(key) == layer}  # fmt: skip
        elif isinstance(own, dict):
            small[name] = shrunk(own, ids, words)
        elif name in DEPTHS and isinstance(own, int):
            small[name] = len(kept)
        elif name in SIZES and isinstance(own, int) and not isinstance(own, bool):
            small[name] = SIZES[name]
        elif name in ("image_size", "patch_size") and isinstance(own, list | tuple):
            small[name] = [SIZES[name]] * len(own)
        elif name.startswith("vocab_size") and isinstance(own, int):
            small[name] = words
        elif name == "unpadded_vocab_size":  # heads know fewer
            small[name] = words - 4
        elif isinstance(own, list | tuple) and len(own) == depth > 2:
            small[name] = [_size(name, own[layer]) for layer in kept]
        elif name.endswith(("token_id", "token_index")):
            small[name] = next((token for part, token in ids.items() if name.startswith(part)), None)
        else:
            small[name] = own
    return small


def _kinds(settings: dict[str, Any], depth: int) -> list[int]:
    """The first layer of each kind, of the published layout; two at least."""
    lists = {name: own for name, own in settings.items() if isinstance(own, list | tuple) and len(own) == depth}
    told = [own for name, own in lists.items() if name.endswith(("layer_types", "no_rope_layers", "indexer_types"))]
    kinds: dict[Any, int] = {}
    for layer, kind in enumerate(zip(*told, strict=True)):
        kinds.setdefault(kind, layer)
    return sorted(kinds.values()) if len(kinds) > 1 else [0, 1]


def _size(name: str, own: Any) -> Any:
    return SIZES[name] if name in SIZES and isinstance(own, int) and not isinstance(own, bool) else own


def _scaled(own: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    """Settings of one layer that differ from the others', as much as there."""
    return {name: _size(name, whole[name]) * value // whole[name] for name, value in own.items()}


def config(model_type: str, tokenizer: Any, more: dict[str, Any]) -> Any:
    """The type's default configuration, shrunk, with ``more`` settings by their paths."""
    kind = CONFIG_MAPPING[model_type]
    spare = iter(tokenizer.convert_tokens_to_ids(f"<{at}>") for at in range(32))
    told = kind().to_dict()
    if told.get("vision_config", ...) is None:  # which every checkpoint with images has
        told = kind(vision_config={}).to_dict()
    ids = {part: tokenizer.convert_tokens_to_ids(token) for part, token in MARKS.items()}
    others = sorted(
        name
        for name in _names(told)
        if name.endswith(("token_id", "token_index")) and not name.startswith(tuple(MARKS))
    )
    ids |= {name: next(spare) for name in others}
    small = shrunk(told, ids, len(tokenizer))
    for path, own in (OWN.get(model_type, {}) | more).items():
        *parents, name = path.split(".")
        place = small
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = _told(own, tokenizer)
    return kind.from_dict(small)


def _told(own: Any, tokenizer: Any) -> Any:
    """A setting with ids for tokens."""
    if isinstance(own, dict):
        return {name: _told(value, tokenizer) for name, value in own.items()}
    return tokenizer.convert_tokens_to_ids(own) if isinstance(own, str) and own.startswith("<") else own


def _names(settings: dict[str, Any]) -> set[str]:
    inner = [_names(own) for own in settings.values() if isinstance(own, dict)]
    return {name for name in settings if isinstance(name, str)}.union(*inner)


class Processor:
    """A stand-in for the type's processor: its image processor where it takes small images, and as many placeholders
    as the model makes tokens of them."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        bearers = [own for own in (model.base_model, model) if hasattr(own, "get_image_features")]
        self.owner: Any = bearers[0] if bearers else None
        self.image_processor = image_processor(model, self.owner)
        self.arguments = inspect.signature(model.forward).parameters
        self.counts: dict[tuple[int, int], int] = {}

    def apply_chat_template(self, messages: Any, add_generation_prompt: bool) -> str:
        parts = [IMAGE if part["type"] == "image" else part["text"] for part in messages[0]["content"]]
        return f"<|im_start|>user\n{''.join(parts)}<|im_end|>\n<|im_start|>assistant\n"

    def __call__(self, text: list[str], images: Any = (), **options: Any) -> BatchFeature:
        flat = [image for own in images for image in own]
        counts = iter([self._count(image) for image in flat])
        pieces = [one.split(IMAGE) for one in text]
        told = [own[0] + "".join(START + IMAGE * next(counts) + END + piece for piece in own[1:]) for own in pieces]
        batch = self.tokenizer(told, padding=True, return_tensors="pt", add_special_tokens=False)
        batch.pop("token_type_ids", None)
        marks = (batch["input_ids"] == self.tokenizer.convert_tokens_to_ids(IMAGE)).long()
        batch |= {name: marks for name in TYPED if name in self.arguments}
        return BatchFeature(dict(batch) | (self._pixels(flat) if flat else {}))

    def _pixels(self, images: Sequence[Image.Image]) -> dict[str, Any]:
        pixels = self.image_processor(images=list(images), return_tensors="pt")
        return {name: own for name, own in pixels.items() if name in self.arguments}

    @torch.no_grad()
    def _count(self, image: Image.Image) -> int:
        if self.owner is None:  # images enter by another way than tokens of their own
            return 1
        if image.size not in self.counts:
            wanted = inspect.signature(self.owner.get_image_features).parameters
            pixels = {name: own for name, own in self._pixels([image]).items() if name in wanted}
            result = self.owner.get_image_features(**BatchFeature(pixels).to(self.owner.device))
            pooled = getattr(result, "pooler_output", result)
            if pooled is None:
                pooled = result.deepstack_features[0][1] if "deepstack_features" in result else result.last_hidden_state
            made = [pooled] if isinstance(pooled, Tensor) else pooled
            self.counts[image.size] = sum(own.shape[:-1].numel() for own in made)
        return self.counts[image.size]


def squares(images: Any, return_tensors: str, side: Any = SIDE) -> dict[str, Tensor]:
    """Every image as one square."""
    sides = (side, side) if isinstance(side, int) else tuple(side)
    whole = [np.array(own.convert("RGB").resize(sides)) for own in images]
    return {"pixel_values": torch.from_numpy(np.stack(whole)).permute(0, 3, 1, 2) / 127.5 - 1}


def patches(images: Any, return_tensors: str) -> dict[str, Tensor]:
    """All images' patches in one row, (P, 3 * PATCH ** 2), of images that keep their shape."""
    cut, made = FuyuImageProcessor(patch_size=dict.fromkeys(SQUARE, PATCH)), []
    for image in images:
        sides = [max(PATCH, side * SIDE // max(image.size) // PATCH * PATCH) for side in image.size]
        whole = torch.from_numpy(np.array(image.convert("RGB").resize(sides))).permute(2, 0, 1) / 127.5 - 1
        made.append(cut.patchify_image(whole[None])[0])
    return {"pixel_values": torch.cat(made)}


def image_processor(model: Any, owner: Any) -> Any:
    """The type's own image processor for small images where images differ in shape, or squares."""
    if model.config.model_type == "fuyu":  # whose processor cuts images once it has the text
        return patches
    asked = inspect.signature(owner.get_image_features).parameters if owner else {"aspect_ratio_ids"}
    if not {name for name in asked if not name.startswith("vision_feature")} - PLAIN:
        return partial(squares, side=getattr(getattr(model.config, "vision_config", None), "image_size", SIDE))
    names = IMAGE_PROCESSOR_MAPPING_NAMES.get(LIKE.get(model.config.model_type, model.config.model_type))
    found = [get_image_processor_class_from_name(name) for name in (names.values() if isinstance(names, dict) else ())]
    kind: Any = next((own for own in found if own is not None), Qwen2VLImageProcessor)
    plain, vision = kind(), getattr(model.config, "vision_config", None)
    settings = {name: own for name, own in PROCESSED.items() if getattr(plain, name, None) is not None}
    like = {"merge_size": "spatial_merge_size", "encoder_patch_size": "patch_size"}
    for name in ("patch_size", "encoder_patch_size", "temporal_patch_size", "merge_size", "spatial_merge_size",
                 "pooling_kernel_size"):  # fmt: skip
        value = getattr(vision, name, getattr(vision, like.get(name, name), None))
        if hasattr(plain, name) and isinstance(value, int):
            settings[name] = value
    if isinstance(getattr(plain, "patch_size", None), dict):  # what is merged afterwards must be whole
        settings["patch_size"] = dict.fromkeys(SQUARE, PATCH * getattr(model.config, "spatial_merge_size", 1))
    if getattr(plain, "size", None) is not None:
        own = {name: value for name, value in dict(plain.size).items() if value is not None}
        counted = own.get("longest_edge", 0) > 10000  # pixels of the whole image
        settings["size"] = {"shortest_edge": 256, "longest_edge": 4096} if counted else dict.fromkeys(own, SIDE)
        if "max_pixels" in own:
            settings["size"] = {"min_pixels": 256, "max_pixels": 4096}
    return kind(**settings | ALONE.get(model.config.model_type, {}))


def build(model_type: str, **more: Any) -> tuple[Any, Any]:
    """A tiny random model and its processor, or one that stands in for it.

    Args:
        more: settings by their paths, such as ``text_config.tie_word_embeddings``.
    """
    if model_type in MADE:
        return MADE[model_type]()
    tokenizer = tiny._tokenizer(IMAGE, VIDEO, START, END, *(f"<{at}>" for at in range(32)))
    settings = config(model_type, tokenizer, more)
    torch.manual_seed(0)
    model = MODELS[type(settings)](settings).eval()
    head = head_of(model)
    if head is None or settings.is_encoder_decoder:
        return model, Processor(model, tokenizer)
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter is not table:
                parameter.normal_(std=0.02)
        blank = ~table.any(-1)  # the padding's vector; an indexer that is asked for zeros finds all tokens alike
        table[blank] = table.std() * torch.randn(int(blank.sum()), table.shape[1]).to(table)
    liven(model)
    media = [getattr(settings, f"{medium}_token_id", None) for medium in ("image", "video", "audio")]
    with torch.no_grad():  # a random model would write them, which many take for media again
        head.weight[[token for token in media if isinstance(token, int) and token < len(head.weight)]] = 0.0
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, Processor(model, tokenizer)
