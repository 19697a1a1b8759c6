"""The embedded models: `mini` of each family, its memory, and questions to show it with."""

from dataclasses import replace
from pathlib import Path

from vismem_core.base.embedded import Base

from .mini import path

SAMPLES = Path(__file__).parent / "samples" / "mosaic.jsonl"
"""Questions about mosaics of held-out photos, written as a file."""

SETTINGS = Path(__file__).parent / "mini" / "train.yaml"
"""What suits models of this size: high rates, few steps."""


def mini_qwen2_5_vl() -> Base:
    """`mini` of the Qwen2.5-VL family."""
    return _mini("qwen2_5_vl")


def mini_qwen2_5_vl_wide() -> Base:
    """`mini` of Qwen2.5-VL that knows digits beside clothes, and questions that do not follow the image at once."""
    return replace(_mini("qwen2_5_vl_wide"), backbone="qwen2_5_vl")


def mini_qwen3_vl() -> Base:
    """`mini` of the Qwen3-VL family."""
    return _mini("qwen3_vl")


def mini_gemma3() -> Base:
    """`mini` of the Gemma 3 family."""
    return _mini("gemma3")


def mini_llava() -> Base:
    """`mini` of the LLaVA-1.5 family."""
    return _mini("llava")


def mini_internvl() -> Base:
    """`mini` of the InternVL family."""
    return _mini("internvl")


def mini_timm_lm() -> Base:
    """`mini` of a ViT of timm with Qwen2."""
    return _mini("timm_lm")


def _mini(family: str) -> Base:
    model = path(family)
    memory = model / "memory"
    return Base(
        model=model,
        memory=memory if memory.is_dir() else None,
        samples=SAMPLES,
        dataset="mosaic",
        settings=SETTINGS,
    )
