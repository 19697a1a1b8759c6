"""Tiny random models with real processors, made offline."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
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


@cache
def _backend() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["what is on the left of the boot ? a bag , a coat ."] * 4, trainer)
    tokenizer.add_special_tokens(SPECIAL)
    return str(tokenizer.to_str())


def qwen_processor() -> Any:
    """A Qwen2.5-VL processor over a small byte-level BPE; patches of 4 pixels, 2x2 merged."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend()),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
    )
    sizes = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2, "min_pixels": 64, "max_pixels": 4096}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**sizes),
        chat_template=TEMPLATE,
    )


def qwen(tied: bool = True, seed: int = 0, spare: int = 0, width: int = 32) -> tuple[Any, Any]:
    """A random Qwen2.5-VL (2 + 2 layers, windowed and full vision blocks) and its processor.

    Args:
        spare: vocabulary rows beyond the tokenizer's, as published checkpoints have.
        width: of both towers.
    """
    processor = qwen_processor()
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
        model.get_decoder().norm.weight.mul_(16.0)


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
