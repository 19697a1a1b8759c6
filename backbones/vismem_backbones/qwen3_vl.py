"""Qwen3-VL and Qwen3.5, with their mixtures of experts: the encoder of Qwen2.5-VL without windows, other positions.

Qwen3-VL's language model takes what earlier blocks of the encoder saw ("deepstack") in its first layers, at the places
of visual tokens. That belongs to the prompt: what follows has none of it, as in the model's own decoding, and latents
neither. Most layers of Qwen3.5's are linear attention: a state for each row, in which images stay.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .qwen2_5_vl import Qwen2_5_VL

RECOMPUTE = "memory.long.context=recompute"


class Qwen3_VL(Qwen2_5_VL):
    """Checkpoints of 2B to 235B in their transformers format, images of any size, several images, videos."""

    name = "qwen3_vl"
    model_types = ("qwen3_vl", "qwen3_vl_moe")
    rereads = False

    @classmethod
    def outlook(cls, config: Any) -> tuple[bool | None, str, dict[str, str]]:
        attaches, why, without = super().outlook(config)
        return attaches, why, without | ({} if cls.rereads else {RECOMPUTE: "its prompts carry more than embeddings"})

    @property
    def norm(self) -> nn.LayerNorm:
        return self.visual.merger.norm  # type: ignore[no-any-return]


class Qwen3_5(Qwen3_VL):
    """Checkpoints of Qwen3.5 and later in their transformers format; those of experts too."""

    name = "qwen3_5"
    model_types = ("qwen3_5", "qwen3_5_moe")
    rereads = True
    packs = False  # states of linear attention would run through all tokens of a packed pass
    lora_targets = Qwen2_5_VL.lora_targets | {
        "long": r"model\.language_model\.layers\.\d+\.(self_attn\.(q_proj|v_proj)|linear_attn\.in_proj_qkv)",
    }
