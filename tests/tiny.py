"""Tiny random models with real processors, made offline."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PerceptionLMConfig,
    PerceptionLMForConditionalGeneration,
    PerceptionLMImageProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


TILE, PATCH = 16, 4
CLIP = {"model_type": "clip_vision_model", "num_hidden_layers": 3, "image_size": TILE, "patch_size": PATCH}
PINPOINTS = [[TILE, TILE], [TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE]]


@cache
def _backend(special: tuple[str, ...] = tuple(SPECIAL)) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["what is on the left of the boot ? a bag , a coat ."] * 4, trainer)
    tokenizer.add_special_tokens(list(special))
    return str(tokenizer.to_str())


def qwen_processor(frames: int = 2) -> Any:
    """A Qwen2.5-VL processor over a small byte-level BPE; patches of 4 pixels and two frames, 2x2 merged."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend()),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
    )
    sizes = {"patch_size": 4, "temporal_patch_size": frames, "merge_size": 2, "min_pixels": 64, "max_pixels": 4096}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**sizes),
        chat_template=TEMPLATE,
    )


def qwen(tied: bool = True, seed: int = 0, spare: int = 0, width: int = 32, window: int = 0) -> tuple[Any, Any]:
    """A random Qwen2.5-VL (2 + 2 layers, windowed and full vision blocks) and its processor.

    Args:
        spare: vocabulary rows beyond the tokenizer's, as published checkpoints have.
        width: of both towers.
        window: how far the second language layer looks back, all the way by default.
    """
    processor = qwen_processor()
    windows = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1} if window else {}
    ids = {name: processor.tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(processor.tokenizer) + spare,
            "hidden_size": width,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [width // 32, width // 32, width // 16],
            },
            "tie_word_embeddings": tied,
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            **windows,
        },
        vision_config={
            "depth": 2,
            "hidden_size": width,
            "intermediate_size": 64,
            "num_heads": 4,
            "out_hidden_size": width,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tied,
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    _liven(model)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    return model, processor


def _tokenizer(*named: str, **options: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend((*SPECIAL[:3], *named))),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        **options,
    )


def _template(image: str, video: str) -> str:
    template = TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", image)
    return template.replace("<|vision_start|><|video_pad|><|vision_end|>", video)


def _assemble(
    kind: Any, config: Any, processor: Any, language: str, vision: dict[str, Any], tied: bool, seed: int, **options: Any
) -> tuple[Any, Any]:
    """A random model of 2 decoder layers around the given vision encoder."""
    tokenizer = processor.tokenizer
    text = {
        "model_type": language,
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if language == "mistral":
        text["sliding_window"] = None
    ids = {"image_token_id": processor.image_token_id}
    if hasattr(processor, "video_token_id"):
        ids["video_token_id"] = processor.video_token_id
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    torch.manual_seed(seed)
    settings = config(text_config=text, vision_config=vision | sizes, tie_word_embeddings=tied, **ids, **options)
    model = kind(settings).eval()
    with torch.no_grad():  # each family of encoders starts from other values; here all start from the same
        for parameter in _tower(model).parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.02)
    _liven(model)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, processor


def _tower(model: Any) -> Any:
    return model.model.visual if hasattr(model.model, "visual") else model.model.vision_tower


def llava(tied: bool = False, seed: int = 0, vision: dict[str, Any] | None = None, **options: Any) -> tuple[Any, Any]:
    """A random LLaVA-1.5: CLIP of 3 blocks of which 2 count, Llama; every image 16 x 16 pixels.

    Args:
        vision: other settings of the encoder.
    """
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE}),
        _tokenizer("<image>"),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_template("<image>\n", ""),
    )
    kinds = LlavaForConditionalGeneration, LlavaConfig
    return _assemble(*kinds, processor, "llama", CLIP | (vision or {}), tied, seed, **options)


def llava_next(tied: bool = False, seed: int = 0, **options: Any) -> tuple[Any, Any]:
    """A random LLaVA-NeXT: the same encoder, Mistral; up to four tiles and the whole image."""
    processor = LlavaNextProcessor(
        LlavaNextImageProcessor(
            size={"shortest_edge": TILE},
            crop_size={"height": TILE, "width": TILE},
            image_grid_pinpoints=PINPOINTS,
        ),
        _tokenizer("<image>"),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_template("<image>\n", ""),
    )
    kinds = LlavaNextForConditionalGeneration, LlavaNextConfig
    return _assemble(*kinds, processor, "mistral", CLIP, tied, seed, image_grid_pinpoints=PINPOINTS, **options)


def llava_onevision(tied: bool = True, seed: int = 0, **options: Any) -> tuple[Any, Any]:
    """A random LLaVA-OneVision: SigLIP of 2 blocks, Qwen2; tiles for single images, and videos."""
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size={"height": TILE, "width": TILE}, image_grid_pinpoints=PINPOINTS),
        _tokenizer("<image>", "<video>"),
        LlavaOnevisionVideoProcessor(size={"height": TILE, "width": TILE}),
        num_image_tokens=(TILE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=_template("<image>\n", "<video>\n"),
    )
    siglip = CLIP | {"model_type": "siglip_vision_model", "num_hidden_layers": 2}
    kinds = LlavaOnevisionForConditionalGeneration, LlavaOnevisionConfig
    return _assemble(*kinds, processor, "qwen2", siglip, tied, seed, image_grid_pinpoints=PINPOINTS, **options)


def internvl(tied: bool = True, seed: int = 0, vision: dict[str, Any] | None = None, **options: Any) -> tuple[Any, Any]:
    """A random InternVL: InternViT of 2 blocks, Qwen3; up to four tiles and a thumbnail, no spare vocabulary rows.

    Args:
        vision: other settings of the encoder, such as ``use_qk_norm``.
    """
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size={"height": TILE, "width": TILE}, crop_to_patches=True, min_patches=1, max_patches=4),
        _tokenizer(*names.values(), extra_special_tokens=names),
        InternVLVideoProcessor(size={"height": TILE, "width": TILE}),
        image_seq_length=(TILE // PATCH // 2) ** 2,
        chat_template=_template("<IMG_CONTEXT>\n", "<video>\n"),
    )
    vit = {"model_type": "internvl_vision", "num_hidden_layers": 2, "image_size": [TILE] * 2, "patch_size": [PATCH] * 2}
    kinds = InternVLForConditionalGeneration, InternVLConfig
    return _assemble(*kinds, processor, "qwen3", vit | (vision or {}), tied, seed, **options)


def timm_lm(
    tied: bool = True, seed: int = 0, vision: dict[str, Any] | None = None, pooling: int = 1, **options: Any
) -> tuple[Any, Any]:
    """A random ViT of timm of 2 blocks, Qwen2; every image 16 x 16 pixels.

    Args:
        vision: other arguments of ``timm.create_model``, such as ``reg_tokens``.
        pooling: side of the squares of visual tokens that become one.
    """
    sizes = {"img_size": TILE, "patch_size": PATCH, "embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 2}
    arguments = sizes | (vision or {})
    processor = LlavaProcessor(
        PerceptionLMImageProcessor(vision_input_type="vanilla", tile_size=TILE),
        _tokenizer("<image>"),
        patch_size=PATCH * pooling,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=arguments.get("reg_tokens", 0),
        chat_template=_template("<image>\n", ""),
    )
    kinds = PerceptionLMForConditionalGeneration, PerceptionLMConfig
    options = {
        "vision_use_cls_token": arguments.get("class_token", True),
        "projector_pooling_ratio": pooling,
        "video_token_id": processor.image_token_id,
    } | options
    vit = {"model_type": "timm_wrapper", "architecture": "vit_tiny_patch16_224", "model_args": arguments}
    return _assemble(*kinds, processor, "qwen2", vit, tied, seed, **options)


def rice(tied: bool = False, seed: int = 0) -> tuple[Any, Any]:
    """A random model of LLaVA-OneVision-1.5's structure: RICE of 2 blocks, Qwen3; images of any size."""
    from rice import RiceForConditionalGeneration, RiceVLConfig

    return _assemble(RiceForConditionalGeneration, RiceVLConfig, qwen_processor(frames=1), "qwen3", {}, tied, seed)


def _liven(model: Any) -> None:
    """Make a random model write varied text that depends on all it is given.

    As initialised, networks of this size hardly look at their input, and with a tied head they repeat its last token.
    So what the layers write outweighs the embeddings (which stay as they are, and are the head where it is tied), and
    the final norm spreads the logits.
    """
    tables = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter not in tables:
                parameter.mul_(10.0)
        model.model.language_model.norm.weight.mul_(16.0)


def awake(memory: Any, seed: int = 1, noise: float = 0.2) -> Any:
    """Move every trained tensor off its initial value (a fresh LoRA does nothing), and return ``memory``."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in memory.trained().values():
            tensor += (noise * torch.randn(tensor.shape, generator=generator)).to(tensor)
    return memory


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Noise of the given size in pixels."""
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)
