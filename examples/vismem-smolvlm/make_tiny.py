"""Makes the model in ``vismem_smolvlm/tiny``: ``python make_tiny.py DIR``."""

from __future__ import annotations

import sys

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    PreTrainedTokenizerFast,
)

from vismem_core.testing import liven

SIDE, PATCH, SCALE = 16, 4, 2
PAD, END, IMAGE = "<|endoftext|>", "<end_of_utterance>", "<image>"
PLACES = ["<fake_token_around_image>", "<global-img>", *(f"<row_{y}_col_{x}>" for y in (1, 2) for x in (1, 2))]
CHAT = (
    "{% for message in messages %}{{ message.role }}:"
    "{% for part in message.content %}{% if part.type == 'image' %}<image>{% else %} {{ part.text }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def processor() -> Idefics3Processor:
    """Bytes for words; images in up to four tiles of 16 x 16 pixels and a small copy of the whole."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    words.add_special_tokens([PAD, END, IMAGE, *PLACES])
    edge = {"longest_edge": SIDE}
    return Idefics3Processor(
        Idefics3ImageProcessor(size={"longest_edge": 2 * SIDE}, max_image_size=edge),
        PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END, pad_token=PAD, padding_side="left"),
        image_seq_len=(SIDE // PATCH // SCALE) ** 2,
        chat_template=CHAT,
    )


def model(tokenizer: PreTrainedTokenizerFast) -> Idefics3ForConditionalGeneration:
    """Two layers in each tower, random weights that make something of their input."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text = {"model_type": "llama", "vocab_size": len(tokenizer), "num_key_value_heads": 2, **sizes, **ids}
    config = Idefics3Config(
        text_config=text | {"max_position_embeddings": 2048, "tie_word_embeddings": True},
        vision_config=sizes | {"image_size": SIDE, "patch_size": PATCH},
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=SCALE,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    made = Idefics3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for weight in made.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.02)
    liven(made)
    made.generation_config.eos_token_id = tokenizer.eos_token_id
    made.generation_config.pad_token_id = tokenizer.pad_token_id
    return made


if __name__ == "__main__":
    own = processor()
    own.save_pretrained(sys.argv[1])
    model(own.tokenizer).to(torch.bfloat16).save_pretrained(sys.argv[1])
