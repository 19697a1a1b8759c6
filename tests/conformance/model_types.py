"""Tiny random models of every image-text-to-text type that transformers knows, from their default configurations."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tiny
import torch
from PIL import Image
from torch import Tensor
from transformers import CONFIG_MAPPING, BatchFeature, Qwen2VLImageProcessor
from transformers.models.auto.image_processing_auto import (
    IMAGE_PROCESSOR_MAPPING_NAMES,
    get_image_processor_class_from_name,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING as MODELS
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from vismem_core.testing import liven

TYPES = tuple(sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES))
WIDTH, SIDE, PATCH = 32, 16, 4
SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "embed_dim", "d_model", "out_hidden_size", "projection_dim", "mm_hidden_size",
        "projector_hidden_size", "vision_hidden_size", "text_hidden_size", "vision_output_dim"), WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "mlp_dim", "mlp_hidden_size", "hidden_dim",
        "encoder_ffn_dim", "decoder_ffn_dim"), 2 * WIDTH),
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
SQUARE = ("height", "width")
SHAPES = {"image_grid_thw", "image_sizes", "pixel_attention_mask", "spatial_shapes", "target_sizes"}
"""Arguments of ``get_image_features`` by which a model is told the shapes of images."""
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
    return {"text_config.rope_parameters": ROPE | {"mrope_section": list(section)} | more}


GLM = mrope(1, 1, 2, partial_rotary_factor=1.0)
MLA = {"num_key_value_heads": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "head_dim": 4,
       "kv_lora_rank": 16, "q_lora_rank": 16, "rope_parameters": ROPE}  # fmt: skip
LINEAR = {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4,
          "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}  # fmt: skip


def text(settings: dict[str, Any]) -> dict[str, Any]:
    return {f"text_config.{name}": own for name, own in settings.items()}


OWN: dict[str, dict[str, Any]] = {
    "qwen2_vl": mrope(1, 1, 2),
    "qwen2_5_vl": mrope(1, 1, 2) | {"vision_config.fullatt_block_indexes": [1], "vision_config.window_size": 16},
    "qwen3_vl": mrope(2, 1, 1, mrope_interleaved=True) | {"vision_config.deepstack_visual_indexes": [0]},
    "qwen3_vl_moe": mrope(2, 1, 1, mrope_interleaved=True) | {"vision_config.deepstack_visual_indexes": [0]},
    "paddleocr_vl": mrope(1, 1, 2),
    "ernie4_5_vl_moe": mrope(1, 1, 2),
    **dict.fromkeys(
        ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"), mrope(1, 1, 2) | {"vision_start_token_id": START}
    ),
    "cosmos3_edge": mrope(1, 1, 2),
    **dict.fromkeys(("glm4v", "glm46v", "glmga", "glm_ocr", "glm4v_moe"), GLM),
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "minicpmv4_6", "minicpmv4_7", "minicpm_ocr", "qwen4_exp"), text(LINEAR)),
    "kimi_k25": text(MLA) | {"projection_hidden_size": WIDTH, "vision_config.projection_hidden_size": 4 * WIDTH},
    "gemma3": {"mm_tokens_per_image": 4},
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "cohere2_vision": {"alignment_intermediate_size": 2 * WIDTH},
    "janus": {"vq_config.base_channels": 32, "vq_config.channel_multiplier": [1, 1], "vq_config.num_embeddings": 64},
    "llava_next_video": {"image_grid_pinpoints": tiny.PINPOINTS},
    "vipllava": {"vision_feature_layers": [-2, -1]},
    "cosmos3_omni": {"vision_config.deepstack_visual_indexes": [0]},
    "hunyuan_vl": mrope(1, 1, 1, 1) | {"text_config.head_dim": 8},
    "cohere_compass": text({"rope_parameters": {"full_attention": ROPE}}),
    "step3p7": {"text_config.sliding_window": 512},
    "glm5_next": text({"num_key_value_heads": 4}),
    "paligemma": {"vision_config.num_image_tokens": 16},
    "ovis2": {"vision_config.hidden_stride": 2, "vision_config.vocab_size": 40},
    "internvl": {"vision_config.image_size": [SIDE, SIDE], "vision_config.patch_size": [PATCH, PATCH]},
}


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
        elif name == "vocab_size" and isinstance(own, int):
            small[name] = words
        elif isinstance(own, list | tuple) and len(own) == depth > 2:
            small[name] = [_size(name, own[layer]) for layer in kept]
        elif name.endswith(("token_id", "token_index")):
            small[name] = next((token for part, token in ids.items() if name.startswith(part)), None)
        else:
            small[name] = own
    return small


def _kinds(settings: dict[str, Any], depth: int) -> list[int]:
    """The first layer of each kind, of the published layout; two at least."""
    lists = [own for name, own in settings.items()
             if isinstance(own, list | tuple) and len(own) == depth and (name.endswith("layer_types") or name == "no_rope_layers")]  # fmt: skip
    kinds: dict[Any, int] = {}
    for layer, kind in enumerate(zip(*lists, strict=True)):
        kinds.setdefault(kind, layer)
    return sorted(kinds.values()) if len(kinds) > 1 else [0, 1]


def _size(name: str, own: Any) -> Any:
    return SIZES[name] if name in SIZES and isinstance(own, int) and not isinstance(own, bool) else own


def _scaled(own: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    """Settings of one layer that differ from the others', as much as there."""
    return {name: _size(name, whole[name]) * value // whole[name] for name, value in own.items()}


def config(model_type: str, tokenizer: Any) -> Any:
    """The type's default configuration, shrunk."""
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
    for path, own in OWN.get(model_type, {}).items():
        *parents, name = path.split(".")
        place = small
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = tokenizer.convert_tokens_to_ids(own) if isinstance(own, str) and own.startswith("<") else own
    return kind.from_dict(small)


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
        self.image_processor = image_processor(model, self.owner) if bearers else squares
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
        batch |= {name: marks for name in ("mm_token_type_ids", "token_type_ids") if name in self.arguments}
        return BatchFeature(dict(batch) | (self._pixels(flat) if flat else {}))

    def _pixels(self, images: Sequence[Image.Image]) -> dict[str, Any]:
        pixels = self.image_processor(images=list(images), return_tensors="pt")
        return {name: own for name, own in pixels.items() if name in self.arguments}

    @torch.no_grad()
    def _count(self, image: Image.Image) -> int:
        if image.size not in self.counts:
            wanted = inspect.signature(self.owner.get_image_features).parameters
            pixels = {name: own for name, own in self._pixels([image]).items() if name in wanted}
            result = self.owner.get_image_features(**pixels)
            pooled = getattr(result, "pooler_output", result)
            made = [pooled] if isinstance(pooled, Tensor) else pooled
            self.counts[image.size] = sum(own.shape[:-1].numel() for own in made)
        return self.counts[image.size]


def squares(images: Any, return_tensors: str) -> dict[str, Tensor]:
    """Every image as one square."""
    whole = [np.array(own.convert("RGB").resize((SIDE, SIDE))) for own in images]
    return {"pixel_values": torch.from_numpy(np.stack(whole)).permute(0, 3, 1, 2) / 127.5 - 1}


def image_processor(model: Any, owner: Any) -> Any:
    """The type's own image processor for small images where images differ in shape, or squares."""
    if not SHAPES & set(inspect.signature(owner.get_image_features).parameters):
        return squares
    names = IMAGE_PROCESSOR_MAPPING_NAMES.get(model.config.model_type)
    found = [get_image_processor_class_from_name(name) for name in (names.values() if isinstance(names, dict) else ())]
    kind: Any = next((own for own in found if own is not None), Qwen2VLImageProcessor)
    plain, vision = kind(), model.config.vision_config
    settings: dict[str, Any] = {}
    like = {"merge_size": "spatial_merge_size", "encoder_patch_size": "patch_size"}
    for name in ("patch_size", "encoder_patch_size", "temporal_patch_size", "merge_size", "spatial_merge_size"):
        value = getattr(vision, like.get(name, name), None)
        if hasattr(plain, name) and isinstance(value, int):
            settings[name] = value
    if isinstance(getattr(plain, "patch_size", None), dict):  # what is merged afterwards must be whole
        settings["patch_size"] = dict.fromkeys(SQUARE, PATCH * getattr(model.config, "spatial_merge_size", 1))
    if getattr(plain, "size", None) is not None:
        own = {name: value for name, value in dict(plain.size).items() if value is not None}
        counted = own.get("longest_edge", 0) > 10000  # pixels of the whole image
        settings["size"] = {"shortest_edge": 256, "longest_edge": 4096} if counted else dict.fromkeys(own, SIDE)
    if getattr(plain, "crop_size", None) is not None:
        settings["crop_size"] = dict.fromkeys(SQUARE, SIDE)
    if hasattr(plain, "max_image_size"):
        settings["max_image_size"] = {"longest_edge": SIDE}
    if hasattr(plain, "min_pixels"):
        settings |= {"min_pixels": 256, "max_pixels": 4096}
    if hasattr(plain, "max_image_tokens"):
        settings |= {"min_image_tokens": 4, "max_image_tokens": 16, "do_image_splitting": False}
    if hasattr(plain, "image_grid_pinpoints"):
        settings["image_grid_pinpoints"] = tiny.PINPOINTS
    return kind(**settings)


def build(model_type: str) -> tuple[Any, Any]:
    """A tiny random model and its processor, or one that stands in for it."""
    if model_type in MADE:
        return MADE[model_type]()
    tokenizer = tiny._tokenizer(IMAGE, VIDEO, START, END, *(f"<{at}>" for at in range(32)))
    settings = config(model_type, tokenizer)
    torch.manual_seed(0)
    model = MODELS[type(settings)](settings).eval()
    head = model.get_output_embeddings()
    if head is None:
        return model, Processor(model, tokenizer)
    tables = {model.get_input_embeddings().weight}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter not in tables:
                parameter.normal_(std=0.02)
    liven(model)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, Processor(model, tokenizer)
