"""Qwen2.5-VL: packed patches in windows, a 2x2 merger, M-RoPE positions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

from vismem_core.base.backbone import Backbone
from vismem_core.base.vision import VisionStates, attend, beside


class Qwen2_5_VL(Backbone):
    """Checkpoints of 3B to 72B in their transformers format, images of any size, several images, videos."""

    name = "qwen2_5_vl"
    model_types: ClassVar[tuple[str, ...]] = ("qwen2_5_vl",)
    packs = True
    lora_targets = {
        "short": r"model\.visual\.blocks\.\d+\.attn\.qkv",
        "long": r"model\.language_model\.layers\.\d+\.self_attn\.(q_proj|v_proj)",
    }

    @property
    def visual(self) -> Any:
        """The vision encoder with its merger."""
        return self.model.model.visual

    @property
    def vision_width(self) -> int:
        return int(self.visual.config.hidden_size)

    @property
    def merge(self) -> int:
        return int(self.visual.spatial_merge_unit)

    @property
    def placeholders(self) -> dict[str, int]:
        return {"image": self.model.config.image_token_id, "video": self.model.config.video_token_id}

    @property
    def norm(self) -> nn.Module:
        """What the merger begins with."""
        return self.visual.merger.ln_q  # type: ignore[no-any-return]

    @property
    def vision_device(self) -> torch.device:
        return self.norm.weight.device  # type: ignore[return-value]

    @property
    def vision_dtype(self) -> torch.dtype:
        return self.norm.weight.dtype  # type: ignore[return-value]

    @contextmanager
    def record(self, states: VisionStates, *, keep: bool, inputs: bool) -> Iterator[None]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            pixels = args[0] if args else kwargs["hidden_states"]
            grid = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
            sizes = grid.prod(-1).tolist()
            states.patches += [self._patches(*size) for size in grid.tolist()]
            states.tokens += [size // self.merge for size in sizes]
            if inputs:
                states.inputs.append({"hidden_states": pixels, "grid_thw": grid})

        with ExitStack() as stack:
            stack.callback(self.visual.register_forward_pre_hook(enter, with_kwargs=True).remove)
            for index, block in enumerate(self.visual.blocks if keep else []):
                for handle in _keep_keys_and_values(block.attn, index, states):
                    stack.callback(handle.remove)
            yield

    def _patches(self, frames: int, height: int, width: int) -> int:
        """Tokens that the encoder's blocks see of one image or video."""
        return frames * height * width

    def encode(self, inputs: dict[str, Tensor]) -> None:
        self.visual(**inputs)

    def carry(self, extra: Tensor, states: VisionStates, rows: Sequence[int]) -> Tensor:
        # The extra tokens have no place in the image: their rotation is the identity, and they look at all patches
        # in windowed blocks too.
        where = states.gather(rows)
        for index, block in enumerate(self.visual.blocks):
            extra = beside(extra, block)
            fused, heads = block.attn.qkv(block.norm1(extra)), block.attn.num_heads
            queries, keys, values = rearrange(fused, "r e (qkv heads w) -> qkv r heads e w", qkv=3, heads=heads)
            mixed = attend(queries, keys, values, states, index, where)
            extra = extra + block.attn.proj(mixed)
            extra = extra + block.mlp(block.norm2(extra))
        return extra

    def project(self, tokens: Tensor) -> Tensor:
        merged: Tensor = self.visual.merger(rearrange(tokens, "r patches D -> (r patches) D"))
        return rearrange(merged, "(r n) d -> r n d", r=len(tokens))


def _keep_keys_and_values(attention: Any, block: int, states: VisionStates) -> list[RemovableHandle]:
    fused: list[Tensor] = []

    def after_qkv(module: nn.Module, args: Any, output: Tensor) -> None:
        heads = attention.num_heads
        fused.append(rearrange(output, "patches (qkv heads w) -> qkv patches heads w", qkv=3, heads=heads))

    def after_attention(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
        queries, keys, values = fused.pop()
        _, keys = apply_rotary_pos_emb_vision(queries, keys, *kwargs["position_embeddings"])
        states.extend(block, keys, values.contiguous())

    return [
        attention.qkv.register_forward_hook(after_qkv),
        attention.register_forward_hook(after_attention, with_kwargs=True),
    ]
