"""The LLaVA family: CLIP or SigLIP, a projector that merges nothing, and tiles for larger images since LLaVA-NeXT."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoProcessor, BatchFeature

from vismem_core.base.images import Picture
from vismem_core.base.vision import VisionStates

from .qwen2_5_vl import Qwen2_5_VL
from .tiles import Tiles, listen


class Llava(Tiles):
    """LLaVA-1.5 in its transformers format: one tile per image."""

    name = "llava"
    model_types = ("llava",)
    towers = ("clip_vision_model", "siglip_vision_model")
    stack, attention, norm = "encoder.layers", "self_attn", "layer_norm1"

    def step(self, block: Any, extra: Tensor, mixed: Tensor) -> Tensor:
        extra = extra + block.self_attn.out_proj(mixed)
        return extra + block.mlp(block.layer_norm2(extra))  # type: ignore[no-any-return]


class LlavaNext(Llava):
    """LLaVA-NeXT (1.6): the whole image and tiles of it, in rows that end with a newline."""

    name = "llava_next"
    model_types = ("llava_next",)

    @contextmanager
    def record(self, states: VisionStates, *, keep: bool, inputs: bool) -> Iterator[None]:
        # Only where the model puts an image's tiles together are their number and the tokens they come to known.
        def packed(result: Any, tiles: Sequence[Tensor], *args: Any, **kwargs: Any) -> None:
            _together(states, [len(own) for own in tiles], [len(own) for own in result[0]])

        with super().record(states, keep=keep, inputs=inputs), listen(self.model.model, "pack_image_features", packed):
            yield


class LlavaOneVision(LlavaNext):
    """LLaVA-OneVision: tiles where a prompt has one image, one tile for each of several, and videos."""

    name = "llava_onevision"
    model_types = ("llava_onevision",)

    @property
    def placeholders(self) -> dict[str, int]:
        return {"image": self.model.config.image_token_id, "video": self.model.config.video_token_id}

    @contextmanager
    def record(self, states: VisionStates, *, keep: bool, inputs: bool) -> Iterator[None]:
        def pooled(result: Any, *args: Any, **kwargs: Any) -> None:
            named = (own for name, own in kwargs.items() if name.startswith("pixel_values"))
            videos, frames = next(iter([*args, *named])).shape[:2]
            vision = self.model.config.vision_config
            side = math.ceil(vision.image_size // vision.patch_size / 2)
            _together(states, [frames] * videos, [frames * side**2 + 1] * videos)  # the last is a newline

        with super().record(states, keep=keep, inputs=inputs), listen(self.model.model, "get_video_features", pooled):
            yield


def _together(states: VisionStates, tiles: Sequence[int], tokens: Sequence[int]) -> None:
    """The encoder's last call was for images of so many tiles and language tokens."""
    del states.tokens[len(states.tokens) - sum(tiles) :]
    for count, length in zip(tiles, tokens, strict=True):
        states.tokens += [0] * (count - 1) + [length]


class LlavaOneVision15(Qwen2_5_VL):
    """LLaVA-OneVision-1.5, which brings its own code: RICE blocks over packed patches, a 2x2 merger, 1-D positions.

    Every frame has a class token in front of its patches, which memory tokens see as the patches do.
    """

    name = "llava_onevision1_5"
    model_types = ("llavaonevision1_5",)
    packs = False

    @classmethod
    def load(cls, source: str, **options: Any) -> tuple[Any, Any]:
        shared = {key: options[key] for key in ("revision", "trust_remote_code") if key in options}
        processor = AutoProcessor.from_pretrained(source, **shared)
        return AutoModelForCausalLM.from_pretrained(source, **options).eval(), processor

    @property
    def decoder(self) -> nn.Module:
        return self.model.model.language_model  # type: ignore[no-any-return]

    @property
    def merge(self) -> int:
        return int(self.visual.spatial_merge_size) ** 2

    def inputs(
        self,
        prompts: Sequence[str],
        images: Sequence[Sequence[Picture]] = (),
        before: Sequence[Sequence[tuple[str, str]]] = (),
    ) -> BatchFeature:
        batch = super().inputs(prompts, images, before)
        batch.pop("mm_token_type_ids", None)  # its processor is Qwen's, whose later versions say more than it takes
        return batch

    def _patches(self, frames: int, height: int, width: int) -> int:
        return frames * (1 + height * width)
