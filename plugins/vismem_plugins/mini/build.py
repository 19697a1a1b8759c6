"""An untrained `mini` of a family: configuration, processor and chat template, of the published classes.

A new family is one entry of `FAMILIES`: a function that builds the model and its processor, and one that
makes of cells what its image processor would make of their mosaics.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from vismem_plugins.mosaic import CELL

PAD, EOS, UNKNOWN = "<|endoftext|>", "<|im_end|>", "<unk>"
SPECIAL = (
    PAD,
    "<|im_start|>",
    EOS,
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    UNKNOWN,
)
# The words of `mosaic`, then a few that other prompts are likely to use; all else is <unk>.
WORDS = """
system user assistant . , : ; ? ! ( ) 0 1 2 3 4 5 6 7 8 9
what is at row column count the cells cell where left of above below right same as list a an
opposite diagonal corner first last next most least frequent kind are there how many which yes no
top trousers dress coat sandal sneaker boot bag clothing footwear accessory
and or not in on to it this that image picture photo answer question with one word describe
show me please both second different between
""".split()  # noqa: SIM905
VOCABULARY = 160  # rows of the embedding; the published families have spare ones too
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word or punctuation mark, lower-cased; decoding joins them with spaces."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate((*SPECIAL, *WORDS))}, unk_token=UNKNOWN))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        extra_special_tokens=list(SPECIAL[1:-1]),
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def qwen2_5_vl() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Qwen2.5-VL; the encoder's windows are one cell wide, and its last block sees the whole picture."""
    words = tokenizer()
    pixels = {"min_pixels": CELL**2, "max_pixels": (9 * CELL) ** 2}
    look = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2, **pixels}
    gray = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**look, **gray),
        tokenizer=words,
        video_processor=Qwen2VLVideoProcessor(**look, **gray),
        chat_template=CHAT,
    )
    vocabulary = words.get_vocab()
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 2048,
            # The sections of height and width hold the slow frequencies, and here they tell 1 from 2.
            "rope_parameters": {"rope_type": "default", "rope_theta": 10.0, "mrope_section": [2, 4, 6]},
            "bos_token_id": None,
            "eos_token_id": vocabulary[EOS],
            "pad_token_id": vocabulary[PAD],
        },
        vision_config={
            "depth": 3,
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_heads": 4,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": CELL,
            "fullatt_block_indexes": [2],
            "out_hidden_size": 96,
        },
        image_token_id=vocabulary["<|image_pad|>"],
        video_token_id=vocabulary["<|video_pad|>"],
        vision_start_token_id=vocabulary["<|vision_start|>"],
        vision_end_token_id=vocabulary["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    return Qwen2_5_VLForConditionalGeneration(config), processor


def qwen_pixels(cells: Tensor, size: int) -> dict[str, Tensor]:
    """Patches of 14 x 14 in runs of 2 x 2, each once for every colour and frame: (4 * N, 3 * 2 * 14 * 14)."""
    half = CELL // 2
    parts = cells.view(-1, 2, half, 2, half).transpose(2, 3).reshape(-1, 1, half * half)
    return {
        "pixel_values": parts.expand(-1, 6, -1).reshape(-1, 6 * half * half),
        "image_grid_thw": torch.tensor([[1, 2 * size, 2 * size]]).expand(len(cells) // size**2, 3),
    }


class Family(NamedTuple):
    """What differs between families."""

    make: Callable[[], tuple[PreTrainedModel, ProcessorMixin]]
    pixels: Callable[[Tensor, int], dict[str, Tensor]]
    """Cells (B * size**2, 28, 28) in -1..1, and the size, to the arguments of `get_image_features`."""


FAMILIES = {"qwen2_5_vl": Family(qwen2_5_vl, qwen_pixels)}


def build(family: str, seed: int = 0) -> tuple[Any, Any]:
    """A model with random weights and its processor.

    Raises:
        ValueError: an unknown family.
    """
    if family not in FAMILIES:
        raise ValueError(f"there is no mini of {family!r}; there are {', '.join(FAMILIES)}")
    torch.manual_seed(seed)
    model, processor = FAMILIES[family].make()
    words = processor.tokenizer
    model.generation_config = GenerationConfig(
        eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id, max_new_tokens=32, do_sample=False
    )
    return model, processor
