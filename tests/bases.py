"""Bases to attach memory to, and questions with images of many sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tiny
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vismem_core as vismem
from vismem_core.base.families import find_backbone
from vismem_core.config import FormerConfig, MemoryConfig, QueryConfig
from vismem_plugins.mini import path

Question = tuple[str, list[Image.Image]]

QUESTIONS: list[Question] = [
    ("what is on the left ?", [tiny.picture(32, 32, 0)]),
    ("a bag , a coat . and a boot ?", [tiny.picture(48, 32, 1), tiny.picture(16, 40, 2)]),
    ("what is it ?", []),
    ("is it a boot or a coat ?", [tiny.picture(24, 56, 3)]),
]
"""One image, two images, none, and an image whose sides are no multiples of the encoder's window."""


def config(name: str = "lora", context: str = "cache", builder: str = "encoder", **memory: Any) -> MemoryConfig:
    """Few latents, no distance: many invocations fit into short answers."""
    shared: dict[str, Any] = {"name": name, "context": context, "rank": 4, "alpha": 8}
    memory = {"trigger": "anywhere:0.3", "distance": 1} | memory
    return MemoryConfig(
        QueryConfig(builder, length=4), FormerConfig(length=3, **shared), FormerConfig(length=5, **shared), **memory
    )


@dataclass
class Base:
    """A base model that memory can be attached to."""

    model: Any
    processor: Any

    def attach(self, settings: MemoryConfig | None = None) -> vismem.Memory:
        """Memory whose every trained tensor has an effect."""
        memory = vismem.attach(self.model, self.processor, config=settings or config())
        tiny.awake(memory)
        return memory

    def inputs(self, *questions: Question) -> Any:
        """What ``generate`` takes, ragged and left-padded."""
        backbone = find_backbone(self.model)(self.model, self.processor)
        return backbone.inputs([text for text, _ in questions], [images for _, images in questions])

    def generate(self, *questions: Question, **options: Any) -> Any:
        """``generate`` on questions, with scores and raw logits; ``answers`` holds the new ids."""
        inputs = self.inputs(*questions)
        options = {"max_new_tokens": 16, "output_logits": True, "output_scores": True} | options
        output = self.model.generate(**inputs, return_dict_in_generate=True, **options)
        output["answers"] = output.sequences[:, inputs["input_ids"].shape[1] :]
        return output


def tied(**options: Any) -> Base:
    return Base(*tiny.qwen(tied=True, **options))


def untied(**options: Any) -> Base:
    return Base(*tiny.qwen(tied=False, **options))


def mini() -> Base:
    model = AutoModelForImageTextToText.from_pretrained(path("qwen2_5_vl"), dtype=torch.float32).eval()
    return Base(model, AutoProcessor.from_pretrained(path("qwen2_5_vl")))


def llava() -> Base:
    return Base(*tiny.llava(tied=False))


def llava_next() -> Base:
    return Base(*tiny.llava_next(tied=True))


def llava_onevision() -> Base:
    return Base(*tiny.llava_onevision(tied=True))


def internvl() -> Base:
    return Base(*tiny.internvl(tied=False))


def rice() -> Base:
    return Base(*tiny.rice(tied=False))


def timm_lm() -> Base:
    return Base(*tiny.timm_lm(tied=True))


FAMILIES = [llava, llava_next, llava_onevision, internvl, rice, timm_lm]
"""Every family beside Qwen2.5-VL, with tied and with untied heads."""
