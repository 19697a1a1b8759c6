"""A vision encoder from timm with any causal language model, as transformers' PerceptionLM puts them together.

:func:`vismem_backbones.compose.compose` makes one; ``from_pretrained`` loads it wherever timm is installed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from einops import rearrange
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from vismem_core.base.vision import VisionStates
from vismem_core.errors import AttachError

from .probing import TARGETS
from .tiles import Tiles


class TimmLM(Tiles):
    """timm's plain VisionTransformer (ViT, DeiT, CLIP, SigLIP, DINOv2) in front of any language model whose layers
    have linear queries and values.

    A block of timm makes queries, keys and values in one linear layer ``qkv``, so the LoRA of short memory adapts the
    keys too, which those of other families do not. What leaves the last block goes through the encoder's last norm.
    With ``projector_pooling_ratio`` r, each r * r consecutive memory tokens are averaged into one vector, as the
    projector does with squares of patches.
    """

    name = "timm_lm"
    model_types = ("perception_lm",)
    towers = ("timm_wrapper",)
    stack, attention, norm = "timm_model.blocks", "attn", "norm1"

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__(model, processor)
        name = model.config.vision_config.architecture
        if (why := refusal(self.vit)) is not None:
            raise AttachError(f"memory cannot work with timm's {name!r}: {why}")
        if not any(re.fullmatch(self.lora_targets["long"], name) for name, _ in model.named_modules()):
            kind = model.config.text_config.model_type
            raise AttachError(
                f"memory cannot work with language model type {kind!r}: no linear layers that make queries and values "
                "are known, for the LoRA of long memory"
            )

    @classmethod
    def matches(cls, model: Any) -> bool:
        return super().matches(model) and refusal(model.model.vision_tower.timm_model) is None

    @property
    def vit(self) -> Any:
        """timm's model."""
        return self.tower.timm_model

    @property
    def layers(self) -> list[int]:
        return [len(self.vit.blocks)]

    @property
    def class_tokens(self) -> int:
        return int(self.model.config.vision_use_cls_token)

    @property
    def vision_width(self) -> int:
        return int(self.vit.embed_dim)

    @property
    def merge(self) -> int:
        return int(self.model.config.projector_pooling_ratio) ** 2

    @property
    def placeholders(self) -> dict[str, int]:
        image, video = self.model.config.image_token_id, self.model.config.video_token_id
        return {"image": image} if video == image else {"image": image, "video": video}

    @property
    def lora_targets(self) -> dict[str, str]:
        return {
            "short": r"model\.vision_tower\.timm_model\.blocks\.\d+\.attn\.qkv",
            "long": rf"model\.language_model\..+\.({TARGETS.pattern})",
        }

    def tokens(self, length: int) -> int:
        patches, ratio = length - self.class_tokens, self.model.config.projector_pooling_ratio
        return int((math.isqrt(patches) // ratio) ** 2) if ratio > 1 else patches

    def heads(self, attention: Any, normed: Tensor) -> Sequence[Tensor]:
        return _split(attention, attention.qkv(normed))

    def keep(self, attention: Any, block: int, states: VisionStates) -> list[RemovableHandle]:
        def after_qkv(module: Any, args: Any, output: Tensor) -> None:
            _, keys, values = _split(attention, output)
            states.extend(block, keys.flatten(0, 1), values.flatten(0, 1))

        return [attention.qkv.register_forward_hook(after_qkv)]

    def step(self, block: Any, extra: Tensor, mixed: Tensor) -> Tensor:
        extra = extra + block.ls1(block.attn.proj(block.attn.norm(mixed)))
        return extra + block.ls2(block.mlp(block.norm2(extra)))  # type: ignore[no-any-return]

    def carry(self, extra: Tensor, states: VisionStates, rows: Sequence[int]) -> Tensor:
        return self.vit.norm(super().carry(extra, states, rows))  # type: ignore[no-any-return]

    def project(self, tokens: Tensor) -> Tensor:
        squares = rearrange(tokens, "r (n square) D -> (r n) square D", square=self.merge)
        made = super().project(squares)  # a square of patches becomes one token
        return rearrange(made, "(r n) one d -> r (n one) d", r=len(tokens))


def refusal(vit: Any) -> str | None:
    """Why memory tokens cannot go through an encoder of timm, or None if they can."""
    from timm.layers import Attention
    from timm.models.vision_transformer import Block, VisionTransformer

    if type(vit) is not VisionTransformer:  # subclasses, EVA, NaFlex and Swin have other blocks or positions in them
        return f"it is a {type(vit).__name__}, and only blocks of a plain VisionTransformer are known"
    for block in vit.blocks:
        if type(block) is not Block or type(block.attn) is not Attention:
            return f"its blocks are {type(block).__name__} with {type(getattr(block, 'attn', None)).__name__}"
        if getattr(block.attn, "gate", None) is not None:
            return "its attention is gated"
    return None


def _split(attention: Any, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each (.., heads, head width), of what ``qkv`` gave."""
    queries, keys, values = rearrange(fused, "... (qkv heads w) -> qkv ... heads w", qkv=3, heads=attention.num_heads)
    return attention.q_norm(queries), attention.k_norm(keys), values
