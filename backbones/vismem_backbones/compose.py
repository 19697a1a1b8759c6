"""A vision-language model made of a vision encoder from timm, a causal language model and a new projector.

Encoders that give a row of tokens become a PerceptionLM of transformers, those that give a map of features, as
convolutional ones do, a FastVLM. Memory tokens pass through plain Vision Transformers only; with the others, short
memory is formed of what the language model is given.
"""

from __future__ import annotations

from copy import deepcopy
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    FastVlmConfig,
    LlavaProcessor,
    PerceptionLMConfig,
    PerceptionLMImageProcessor,
    PreTrainedModel,
    TimmWrapperConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.models.fast_vlm.modeling_fast_vlm import FastVlmMultiModalProjector
from transformers.models.perception_lm.modeling_perception_lm import PerceptionLMMultiModalProjector

from vismem_core.errors import AttachError, nearest
from vismem_core.plugins import reason

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
    weights are random, to where ``image_token`` stands; of a map of features, each place is a token. Register tokens
    are visual tokens like patches. Images are resized to the encoder's size, whatever their shape, and normalised as
    the encoder was trained.

    Args:
        encoder: name of an encoder of square images in timm, such as ``vit_base_patch16_siglip_224.webli`` or
            ``convnext_tiny.fb_in22k``.
        lm: hub id or folder of a causal language model, or the model, which is then used up.
        tokenizer: of the language model; by default what stands beside it.
        pretrained: fetch the encoder's trained weights; otherwise they are random.
        pooling: side of the squares of visual tokens that are averaged into one; 1 for maps of features.
        image_token: added to the tokenizer if it is not there.
        arguments: of ``timm.create_model``, and ``img_size``, which here any encoder has.

    Raises:
        AttachError: timm is not installed, or encoder or language model is of a kind that does not work here.
    """
    vit, made = _encoder(encoder, pretrained, arguments)
    if pooling > 1 and (why := "gives a map of features" if made.mapped else made.registers and "has register tokens"):
        raise AttachError(f"timm's {encoder!r} {why}, which cannot be pooled: use pooling=1")
    if isinstance(lm, PreTrainedModel) and tokenizer is None:
        raise AttachError("a language model that is given as such needs tokenizer=")
    source: Any = lm if isinstance(lm, PreTrainedModel) else AutoModelForCausalLM.from_pretrained(lm)
    words = AutoTokenizer.from_pretrained(lm) if tokenizer is None else tokenizer
    words.add_special_tokens({"additional_special_tokens": [image_token]}, replace_extra_special_tokens=False)
    words.pad_token = words.pad_token or words.eos_token
    words.init_kwargs["padding_side"] = words.padding_side = "left"  # only the former is saved
    if len(words) > source.get_input_embeddings().weight.shape[0]:
        source.resize_token_embeddings(len(words), mean_resizing=False)
    token: Any = words.convert_tokens_to_ids(image_token)
    seen: Any = TimmWrapperConfig(architecture=encoder, model_args=made.arguments, do_pooling=False)
    seen.hidden_size = made.width
    shared: dict[str, Any] = {
        "vision_config": seen,
        "text_config": deepcopy(source.config),  # loading writes to it
        "tie_word_embeddings": source.config.tie_word_embeddings,
    }
    if made.mapped:
        config: Any = FastVlmConfig(image_token_index=token, image_seq_length=made.grid**2, **shared)
    else:
        config = PerceptionLMConfig(
            vision_use_cls_token=made.class_token,
            projector_pooling_ratio=pooling,
            image_token_id=token,
            video_token_id=token,  # there are no videos, and it must name one
            **shared,
        )
    processor = LlavaProcessor(
        _images(vit, made),
        words,
        patch_size=made.side // made.grid * pooling,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=made.registers,
        image_token=image_token,
        chat_template=JOINED.replace("IMAGE", image_token) + (words.chat_template or PLAIN),
    )
    return _join(config, vit, source), processor


class Seen(NamedTuple):
    """What an encoder makes of an image.

    Attributes:
        arguments: of ``timm.create_model``, to make it again.
        side: pixels of an image's sides.
        grid: tokens along them.
        width: of a token.
        mapped: whether it gives a map of features.
        class_token: whether the first token is one.
        registers: tokens of no place, class token aside.
    """

    arguments: dict[str, Any]
    side: int
    grid: int
    width: int
    mapped: bool
    class_token: bool = False
    registers: int = 0


def _encoder(name: str, pretrained: bool, arguments: dict[str, Any]) -> tuple[Any, Seen]:
    import timm

    if not timm.is_model(name):
        raise AttachError(f"timm has no model {name!r}; {nearest(name.partition('.')[0], timm.list_models())}")
    known = arguments
    try:
        try:
            vit: Any = timm.create_model(name, pretrained=pretrained, num_classes=0, **known)
        except TypeError as error:
            if "'img_size'" not in str(error):
                raise
            known = {key: own for key, own in arguments.items() if key != "img_size"}  # it takes images of any size
            vit = timm.create_model(name, pretrained=pretrained, num_classes=0, **known)
    except (OSError, RuntimeError, TypeError) as error:
        raise AttachError(f"timm's {name!r} cannot be made: {' '.join(str(error).split())[:300]}") from error
    seen = _look(vit.eval(), known, arguments.get("img_size"))
    if isinstance(seen, str):
        raise AttachError(f"timm's {name!r} does not work here: {seen}")
    return vit, seen


def _look(vit: Any, known: dict[str, Any], size: Any) -> Seen | str:
    """What the encoder makes of a blank image, or why it does not work."""
    from timm.data import resolve_data_config

    own = getattr(getattr(vit, "patch_embed", None), "img_size", None)
    sides = own or size or resolve_data_config({}, model=vit)["input_size"][1:]
    if isinstance(sides, int):
        sides = (sides, sides)
    side = sides[0]
    if sides[0] != sides[1]:
        return "its images are not square"
    try:
        with torch.no_grad():
            told = vit.forward_features(torch.zeros(1, 3, *sides))
    except Exception as error:  # as models do
        return f"it fails on a blank image of {side} pixels: {reason(error)}"
    shape = tuple(told.shape) if isinstance(told, torch.Tensor) else ()
    if len(shape) == 4 and shape[1] != shape[2] == shape[3]:
        seen = Seen(known, side, shape[2], shape[1], mapped=True)
    elif len(shape) == 4:
        return f"it gives features {shape[1:]}, and they are to be (channels, height, width), of a square image"
    elif len(shape) != 3:
        return "it gives neither a row of tokens nor a map of features"
    elif shape[2] != getattr(vit, "embed_dim", None):
        return "its last tokens are not as wide as its first"
    else:
        first = getattr(vit, "num_prefix_tokens", 0)
        classed = bool(getattr(vit, "has_class_token", first == 1))
        sized = known | {"embed_dim": shape[2]} | ({"img_size": side} if own else {})
        seen = Seen(sized, side, isqrt(shape[1] - first), shape[2], False, classed, first - classed)
        if seen.grid**2 != shape[1] - first:
            return f"it makes {shape[1] - first} tokens of a square image"
    if side // (side // seen.grid) != seen.grid:
        return f"it makes {seen.grid} x {seen.grid} tokens of {side} pixels, which its processor cannot count"
    return seen


def _join(config: PerceptionLMConfig | FastVlmConfig, vit: Any, lm: Any) -> Any:
    """The model of ``config`` with the weights of its parts."""
    head, kind = lm.get_output_embeddings(), lm.config.model_type
    if head is None or lm.config.is_encoder_decoder:
        raise AttachError(f"language model type {kind!r} is no decoder with a head")
    if config.tie_word_embeddings and not hasattr(lm.base_model, "embed_tokens"):
        raise AttachError(f"language model type {kind!r} ties its head to embeddings that are not named embed_tokens")
    family: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    mapped = isinstance(config, FastVlmConfig)
    projector: Any = FastVlmMultiModalProjector if mapped else PerceptionLMMultiModalProjector
    parts = {
        "model.vision_tower.timm_model.": vit,
        "model.multi_modal_projector.": projector(config),
        "model.language_model.": lm.base_model,
        "lm_head.": head,
    }
    state = {prefix + name: own for prefix, part in parts.items() for name, own in part.state_dict().items()}
    try:
        model, info = family.from_pretrained(
            None, config=config, state_dict=state, dtype=lm.dtype, output_loading_info=True
        )
    except TypeError as error:  # the projector reads an encoder's width among its arguments
        raise AttachError(f"timm's encoder does not work here: it does not take its own width: {error}") from error
    if strange := sorted(str(name) for key in ("missing_keys", "unexpected_keys") for name in info[key]):
        raise AttachError(f"language model type {kind!r} does not fit: {strange[0]} is only on one side")
    model.generation_config = lm.generation_config
    ids = torch.arange(min(8, head.weight.shape[0]), device=lm.device)[None]
    with torch.no_grad():
        alone, together = (own.eval()(input_ids=ids).logits for own in (lm, model))
        if not torch.allclose(alone, head(lm.base_model(input_ids=ids).last_hidden_state), atol=1e-4):
            raise AttachError(f"language model type {kind!r} makes its logits by more than one linear layer")
    if not torch.allclose(alone, together, atol=1e-4):  # .to(dtype) casts what angles are made of, loading does not
        raise AttachError(f"language model type {kind!r} says other things alone; load it with dtype=, do not cast it")
    return model


def _images(vit: Any, seen: Seen) -> Any:
    from timm.data import resolve_data_config, str_to_pil_interp

    data = resolve_data_config({}, model=vit)
    shared: dict[str, Any] = {
        "image_mean": list(data["mean"]),
        "image_std": list(data["std"]),
        "resample": str_to_pil_interp(data["interpolation"]),
    }
    if seen.mapped:
        return CLIPImageProcessor(size={"height": seen.side, "width": seen.side}, do_center_crop=False, **shared)
    return PerceptionLMImageProcessor(vision_input_type="vanilla", tile_size=seen.side, **shared)
