"""An untrained `mini` of a family: configuration, processor and chat template, of the published classes.

A new family is one entry of `FAMILIES`: a function that builds the model and its processor.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    GenerationConfig,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PerceptionLMConfig,
    PerceptionLMForConditionalGeneration,
    PerceptionLMImageProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from vismem_plugins.mosaic import CELL

PAD, START, EOS, UNKNOWN = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"
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
TILE = 3 * CELL  # pixels along a side of what families of fixed image size see: larger and smaller mosaics are resized
GRAY: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}
FLAT: dict[str, Any] = {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 10.0}}
"""The language model of a family whose positions are one-dimensional."""
VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "image_size": TILE,
    "patch_size": CELL // 2,
}


def chat(image: str, video: str = "") -> str:
    """The chat template, given what stands for an image and for a video."""
    return (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
        f"{{% if part.type == 'image' %}}{image}"
        f"{{% elif part.type == 'video' %}}{video}"
        "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


QWEN_IDS = {
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}
QWEN_CHAT = chat("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>")
QWEN_LOOK: dict[str, Any] = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
QWEN_VISION: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_heads": 4,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 96,
}


def tokenizer(*special: str, **named: str) -> PreTrainedTokenizerFast:
    """One token a word or punctuation mark, lower-cased; decoding joins them with spaces.

    Args:
        special: tokens of the family.
        named: further ones, as attributes of the tokenizer.
    """
    words = (PAD, START, EOS, *special, *named.values(), UNKNOWN, *WORDS)
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens([PAD, START, EOS, *special, *named.values(), UNKNOWN])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        extra_special_tokens=named,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def qwen2_5_vl() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Qwen2.5-VL; the encoder's windows are one cell wide, and its last block sees the whole picture."""
    look = QWEN_LOOK | {"min_pixels": CELL**2, "max_pixels": (9 * CELL) ** 2}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**look, **GRAY),
        tokenizer=tokenizer(*QWEN_IDS.values()),
        video_processor=Qwen2VLVideoProcessor(**look, **GRAY),
        chat_template=QWEN_CHAT,
    )
    # The sections of height and width hold the slow frequencies, and here they tell 1 from 2.
    rope = {"rope_type": "default", "rope_theta": 10.0, "mrope_section": [2, 4, 6]}
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": rope, **ends(processor.tokenizer)},
        vision_config=QWEN_VISION | {"window_size": CELL, "fullatt_block_indexes": [2]},
        **_ids(processor),
        tie_word_embeddings=True,
    )
    return Qwen2_5_VLForConditionalGeneration(config), processor


def qwen3_vl() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Qwen3-VL; what the encoder's second block sees enters behind the language model's first layer too."""
    look = QWEN_LOOK | {"size": {"shortest_edge": CELL**2, "longest_edge": (9 * CELL) ** 2}}
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**look, **GRAY),
        tokenizer=tokenizer(*QWEN_IDS.values()),
        video_processor=Qwen3VLVideoProcessor(**look, **GRAY),
        chat_template=QWEN_CHAT,
    )
    rope = {"rope_type": "default", "rope_theta": 10.0, "mrope_section": [4, 4, 4], "mrope_interleaved": True}
    text = {**TEXT, "head_dim": 24, "attention_bias": True, "rope_parameters": rope}
    config = Qwen3VLConfig(
        text_config=text | ends(processor.tokenizer),
        vision_config=QWEN_VISION | {"num_position_embeddings": 36, "deepstack_visual_indexes": [1]},
        **_ids(processor),
        tie_word_embeddings=True,
    )
    return Qwen3VLForConditionalGeneration(config), processor


def _ids(processor: ProcessorMixin) -> dict[str, Any]:
    words = processor.tokenizer.get_vocab()
    return {name: words[word] for name, word in QWEN_IDS.items()}


def gemma3() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Gemma 3: SigLIP of three blocks, an image of 3 x 3 tokens that see each other both ways; every other layer of the
    language model looks back a window that is shorter than most prompts."""
    words = tokenizer(boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>")
    processor = Gemma3Processor(
        Gemma3ImageProcessor(size={"height": TILE, "width": TILE}, **GRAY),
        words,
        chat_template=chat("<start_of_image>"),
        image_seq_length=(TILE // CELL) ** 2,
    )
    turning = {"rope_type": "default", "rope_theta": 10.0}
    kinds = ["sliding_attention", "full_attention"]
    text = TEXT | {"head_dim": 24, "query_pre_attn_scalar": 24, "attention_bias": True, "sliding_window": 24}
    text |= {"layer_types": kinds * 2, "rope_parameters": dict.fromkeys(kinds, turning)}
    config = Gemma3Config(
        text_config=text | ends(words),
        vision_config={"num_hidden_layers": 3, **VISION},
        mm_tokens_per_image=processor.image_seq_length,
        image_token_index=words.image_token_id,
        boi_token_index=words.boi_token_id,
        eoi_token_index=words.eoi_token_id,
        tie_word_embeddings=True,
    )
    model = Gemma3ForConditionalGeneration(config)
    # As in `llava`; what a projector of Gemma's starts from are zeros.
    torch.nn.init.normal_(model.model.vision_tower.embeddings.position_embedding.weight, std=0.2)
    torch.nn.init.xavier_uniform_(model.model.multi_modal_projector.mm_input_projection_weight)
    return model, processor


def llava() -> tuple[PreTrainedModel, ProcessorMixin]:
    """LLaVA-1.5: CLIP, of whose four blocks three count, and Llama; an image is 3 x 3 tokens."""
    words = tokenizer("<image>")
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE}, **GRAY),
        words,
        patch_size=CELL,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat("<image>\n"),
    )
    config = LlavaConfig(
        text_config={"model_type": "llama", "attention_bias": True, **FLAT, **ends(words)},
        vision_config={"model_type": "clip_vision_model", "num_hidden_layers": 4, **VISION, "patch_size": CELL},
        image_token_index=processor.image_token_id,
        image_seq_length=(TILE // CELL) ** 2,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    # What a large model starts from is too faint for one so narrow: places are not seen, and nothing passes.
    torch.nn.init.normal_(model.model.vision_tower.embeddings.position_embedding.weight, std=0.2)
    for layer in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
        torch.nn.init.xavier_uniform_(layer.weight)
    return model, processor


def internvl() -> tuple[PreTrainedModel, ProcessorMixin]:
    """InternVL3: InternViT of three blocks and Qwen2; an image is one tile of 3 x 3 tokens."""
    words = tokenizer(
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    size = {"height": TILE, "width": TILE}
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=1, **GRAY),
        words,
        InternVLVideoProcessor(size=size, **GRAY),
        image_seq_length=(TILE // CELL) ** 2,
        chat_template=chat("<IMG_CONTEXT>\n", "<video>\n"),
    )
    config = InternVLConfig(
        text_config={"model_type": "qwen2", **FLAT, **ends(words)},
        vision_config={"num_hidden_layers": 3, "layer_scale_init_value": 1.0, **VISION},
        image_token_id=processor.image_token_id,
        image_seq_length=processor.image_seq_length,
        tie_word_embeddings=True,
    )
    return InternVLForConditionalGeneration(config), processor


def timm_lm() -> tuple[PreTrainedModel, ProcessorMixin]:
    """A ViT of timm, of three blocks, and Qwen2; an image is 6 x 6 patches, of which 2 x 2 make a token."""
    words = tokenizer("<image>")
    processor = LlavaProcessor(
        PerceptionLMImageProcessor(vision_input_type="vanilla", tile_size=TILE, **GRAY),
        words,
        patch_size=CELL,
        vision_feature_select_strategy="full",
        chat_template=chat("<image>\n"),
    )
    arguments = {"img_size": TILE, "patch_size": VISION["patch_size"], "embed_dim": VISION["hidden_size"], "depth": 3}
    arguments |= {"num_heads": VISION["num_attention_heads"], "class_token": False, "global_pool": ""}
    config = PerceptionLMConfig(
        text_config={"model_type": "qwen2", **FLAT, **ends(words)},
        vision_config={
            "model_type": "timm_wrapper",
            "architecture": "vit_tiny_patch16_224",
            "model_args": arguments,
            "do_pooling": False,
        },
        vision_use_cls_token=False,
        projector_pooling_ratio=CELL // VISION["patch_size"],
        image_token_id=processor.image_token_id,
        video_token_id=processor.image_token_id,  # there are no videos, and it must name one
        tie_word_embeddings=True,
    )
    model = PerceptionLMForConditionalGeneration(config)
    # As in `llava`.
    torch.nn.init.normal_(model.model.vision_tower.timm_model.pos_embed, std=0.2)
    for layer in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
        torch.nn.init.xavier_uniform_(layer.weight)
    return model, processor


def ends(words: PreTrainedTokenizerFast) -> dict[str, int | None]:
    """The tokens that begin, end and pad a text."""
    return {"bos_token_id": None, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}


class Family(NamedTuple):
    """What differs between families."""

    make: Callable[[], tuple[PreTrainedModel, ProcessorMixin]]
    steps: int
    """Training steps."""
    teacher: str | None = None
    """The family whose `mini` its language model comes from (`align`); None starts from random weights."""
    align: int = 0
    """Steps in which its encoder learns the teacher's language; without any it starts as the teacher is."""
    domains: tuple[str, ...] = ("clothes",)
    """What its mosaics show."""
    between: float = 0.0
    """Share of the questions that do not follow the image at once: nothing else teaches a model of this size that it
    may stand anywhere."""


FAMILIES = {
    # Its shipped weights were trained by the clock, for 40 minutes; so many steps take about as long.
    "qwen2_5_vl": Family(qwen2_5_vl, 7000),
    # Of two domains, and for memory between image and question.
    "qwen2_5_vl_wide": Family(qwen2_5_vl, 2500, "qwen2_5_vl", domains=("clothes", "digits"), between=0.5),
    "qwen3_vl": Family(qwen3_vl, 3000, teacher="qwen2_5_vl", align=2000),
    "gemma3": Family(gemma3, 1800, teacher="qwen2_5_vl", align=1000),
    "llava": Family(llava, 3000, teacher="qwen2_5_vl", align=2000),
    "internvl": Family(internvl, 3000, teacher="qwen2_5_vl", align=2000),
    "timm_lm": Family(timm_lm, 3000, teacher="qwen2_5_vl", align=2000),
}


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
