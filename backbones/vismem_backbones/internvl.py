"""InternVL3 and 3.5: InternViT over tiles, pixel shuffle, 1-D text positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from einops import rearrange
from torch import Tensor

from vismem_core.base.vision import VisionStates

from .tiles import Tiles


class InternVL(Tiles):
    """Checkpoints in their transformers format ("-HF"), several images in tiles; a video is a row of images.

    Four consecutive memory tokens stand for a 2x2 square of patches, row by row, so that the model's own pixel shuffle
    puts them into one vector in the order that its projector knows.
    """

    name = "internvl"
    model_types = ("internvl",)
    towers = ("internvl_vision",)
    video_pixels = "pixel_values"
    stack, attention, norm = "encoder.layer", "attention", "layernorm_before"

    @property
    def merge(self) -> int:
        return self._side**2

    @property
    def _side(self) -> int:
        return int(1 / self.model.config.downsample_ratio)

    def step(self, block: Any, extra: Tensor, mixed: Tensor) -> Tensor:
        extra = extra + block.lambda_1 * block.attention.projection_layer(mixed)
        return extra + block.lambda_2 * block.mlp(block.layernorm_after(extra))  # type: ignore[no-any-return]

    def carry(self, extra: Tensor, states: VisionStates, rows: Sequence[int]) -> Tensor:
        carried = super().carry(extra, states, rows)
        # Only the last layer, and only where it is named so, is read behind the encoder's own last norm.
        return self.tower.layernorm(carried) if self.model.config.vision_feature_layer == -1 else carried

    def project(self, tokens: Tensor) -> Tensor:
        squares = rearrange(tokens, "r (n h w) D -> (r n) h w D", h=self._side, w=self._side)
        shuffled = self.model.model.pixel_shuffle(squares, self.model.config.downsample_ratio)
        return super().project(rearrange(shuffled, "(r n) h w D -> r (n h w) D", r=len(tokens)))
