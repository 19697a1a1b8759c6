"""A vision-language model made of a vision encoder from timm, a causal language model and a new projector."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaProcessor,
    PerceptionLMConfig,
    PerceptionLMForConditionalGeneration,
    PerceptionLMImageProcessor,
    PreTrainedModel,
    TimmWrapperConfig,
)
from transformers.models.perception_lm.modeling_perception_lm import PerceptionLMMultiModalProjector

from vismem_core.errors import AttachError, nearest

from .timm_lm import refusal

JOINED = (
    "{%- set flat = namespace(messages=[]) -%}{%- for message in messages -%}{%- set flat.text = '' -%}"
    "{%- if message.content is string -%}{%- set flat.text = message.content -%}"
    "{%- else -%}{%- for part in message.content -%}"
    "{%- set flat.text = flat.text + ('IMAGE\n' if part.type == 'image' else part.text) -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- set flat.messages = flat.messages + [dict(message, content=flat.text)] -%}"
    "{%- endfor -%}{%- set messages = flat.messages -%}"
)
"""Turns messages of parts into messages of text, which is what language models' own chat templates take."""
PLAIN = (
    "{%- for message in messages -%}{{ message.role.upper() + ': ' + message.content + '\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
)
"""For language models without a chat template."""


def compose(
    encoder: str,
    lm: str | Path | PreTrainedModel,
    *,
    tokenizer: Any = None,
    pretrained: bool = True,
    pooling: int = 1,
    image_token: str = "<image>",
    **arguments: Any,
) -> tuple[Any, LlavaProcessor]:
    """Model and processor, to be trained, saved and loaded like any other of transformers.

    What the encoder's ``forward_features`` gives, without its class token, goes through an MLP of two layers, whose
    weights are random, to where ``image_token`` stands. Register tokens are visual tokens like patches. Images are
    resized to the encoder's size, whatever their shape, and normalised as the encoder was trained.

    Args:
        encoder: name of a square VisionTransformer in timm, such as ``vit_base_patch16_siglip_224.webli``.
        lm: hub id or folder of a causal language model, or the model, which is then used up.
        tokenizer: of the language model; by default what stands beside it.
        pretrained: fetch the encoder's trained weights; otherwise they are random.
        pooling: side of the squares of visual tokens that are averaged into one.
        image_token: added to the tokenizer if it is not there.
        arguments: of ``timm.create_model``, such as ``img_size``.

    Raises:
        AttachError: timm is not installed, or encoder or language model is of a kind that does not work here.
    """
    vit = _encoder(encoder, pretrained, arguments)
    side, patch = vit.patch_embed.img_size[0], vit.patch_embed.patch_size[0]
    registers = vit.num_prefix_tokens - int(vit.has_class_token)
    if pooling > 1 and registers:
        raise AttachError(f"timm's {encoder!r} has {registers} register tokens, which cannot be pooled: use pooling=1")
    if isinstance(lm, PreTrainedModel) and tokenizer is None:
        raise AttachError("a language model that is given as such needs tokenizer=")
    source: Any = lm if isinstance(lm, PreTrainedModel) else AutoModelForCausalLM.from_pretrained(lm)
    words = AutoTokenizer.from_pretrained(lm) if tokenizer is None else tokenizer
    words.add_special_tokens({"additional_special_tokens": [image_token]}, replace_extra_special_tokens=False)
    words.pad_token = words.pad_token or words.eos_token
    words.padding_side = "left"
    if len(words) > source.get_input_embeddings().weight.shape[0]:
        source.resize_token_embeddings(len(words), mean_resizing=False)
    token: Any = words.convert_tokens_to_ids(image_token)
    model = _join(
        PerceptionLMConfig(
            vision_config=TimmWrapperConfig(
                architecture=encoder,
                model_args=arguments | {"img_size": side, "embed_dim": vit.embed_dim},
                do_pooling=False,
            ),
            text_config=deepcopy(source.config),  # loading writes to it
            vision_use_cls_token=vit.has_class_token,
            projector_pooling_ratio=pooling,
            image_token_id=token,
            video_token_id=token,  # there are no videos, and it must name one
            tie_word_embeddings=source.config.tie_word_embeddings,
        ),
        vit,
        source,
    )
    processor = LlavaProcessor(
        _images(vit, side),
        words,
        patch_size=patch * pooling,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=registers,
        image_token=image_token,
        chat_template=JOINED.replace("IMAGE", image_token) + (words.chat_template or PLAIN),
    )
    return model, processor


def _encoder(name: str, pretrained: bool, arguments: dict[str, Any]) -> Any:
    import timm

    if not timm.is_model(name):
        raise AttachError(f"timm has no model {name!r}; {nearest(name.partition('.')[0], timm.list_models())}")
    try:
        vit: Any = timm.create_model(name, pretrained=pretrained, num_classes=0, **arguments).eval()
    except (OSError, RuntimeError, TypeError) as error:
        raise AttachError(f"timm's {name!r} cannot be made: {' '.join(str(error).split())[:300]}") from error
    why = refusal(vit)
    if why is None and len({*vit.patch_embed.img_size, *vit.patch_embed.grid_size}) != 2:
        why = "its images are not square"
    if why is not None:
        raise AttachError(f"timm's {name!r} does not work here: {why}")
    return vit


def _join(config: PerceptionLMConfig, vit: Any, lm: Any) -> Any:
    """The model of ``config`` with the weights of its parts."""
    head, kind = lm.get_output_embeddings(), lm.config.model_type
    if head is None or lm.config.is_encoder_decoder:
        raise AttachError(f"language model type {kind!r} is no decoder with a head")
    if config.tie_word_embeddings and not hasattr(lm.base_model, "embed_tokens"):
        raise AttachError(f"language model type {kind!r} ties its head to embeddings that are not named embed_tokens")
    parts = {
        "model.vision_tower.timm_model.": vit,
        "model.multi_modal_projector.": PerceptionLMMultiModalProjector(config),
        "model.language_model.": lm.base_model,
        "lm_head.": head,
    }
    state = {prefix + name: own for prefix, part in parts.items() for name, own in part.state_dict().items()}
    family: Any = PerceptionLMForConditionalGeneration
    model, info = family.from_pretrained(
        None, config=config, state_dict=state, dtype=lm.dtype, output_loading_info=True
    )
    if strange := sorted(str(name) for key in ("missing_keys", "unexpected_keys") for name in info[key]):
        raise AttachError(f"language model type {kind!r} does not fit: {strange[0]} is only on one side")
    model.generation_config = lm.generation_config
    ids = torch.arange(min(8, head.weight.shape[0]), device=lm.device)[None]
    with torch.no_grad():
        if not torch.allclose(model.eval()(input_ids=ids).logits, lm.eval()(input_ids=ids).logits, atol=1e-4):
            raise AttachError(f"language model type {kind!r} makes its logits by more than one linear layer")
    return model


def _images(vit: Any, side: int) -> PerceptionLMImageProcessor:
    from timm.data import resolve_data_config, str_to_pil_interp

    data = resolve_data_config({}, model=vit)
    return PerceptionLMImageProcessor(
        vision_input_type="vanilla",
        tile_size=side,
        image_mean=list(data["mean"]),
        image_std=list(data["std"]),
        resample=str_to_pil_interp(data["interpolation"]),
    )
