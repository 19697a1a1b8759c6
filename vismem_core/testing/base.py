"""The base model under test, with and without memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vismem_core.base.backbone import Backbone
from vismem_core.config import FormerConfig, Kind, MemoryConfig, QueryConfig
from vismem_core.decoding.attach import attach, put_on
from vismem_core.files import checkpoint
from vismem_core.memory.memory import Memory
from vismem_core.memory.trigger import Decision, Row, Trigger

from .liveliness import awaken

Question = tuple[str, list[Image.Image]]
NO_END: dict[str, Any] = {"eos_token_id": None, "pad_token_id": 0}
"""Options of ``generate`` with which a random model writes as much as it may."""


def config(context: str = "cache", **memory: Any) -> MemoryConfig:
    """Few latents, of different number for each kind, and no distance: many invocations fit into short answers."""
    shared: dict[str, Any] = {"context": context, "rank": 4, "alpha": 8}
    short, long = FormerConfig(length=3, **shared), FormerConfig(length=5, **shared)
    return MemoryConfig(QueryConfig(length=4), short, long, **({"distance": 1} | memory))


def staggered(otherwise: Decision = "none") -> Trigger:
    """Both kinds in turn, at steps that every prompt has to itself: neighbours take in latents at different times."""
    turns: dict[int, int] = {}
    kinds: dict[int, Kind] = {0: "short", 4: "long"}

    def decide(row: Row) -> Decision:
        return kinds.get((row.step - turns.setdefault(row.seed, len(turns))) % 8, otherwise)

    return Trigger(decide, spec="staggered")


@dataclass
class Base:
    """A model, its processor, and the backbone class that is tested on them.

    Attributes:
        named: the name by which ``family`` is registered, if that is how the author gave it.
        device: where the model lies.
        backbone: the one instance of ``family`` around the model.
    """

    model: Any
    processor: Any
    family: type[Backbone]
    named: str | None = None
    device: str = "cpu"
    backbone: Backbone = field(init=False)

    def __post_init__(self) -> None:
        self.model.to(self.device)
        self.backbone = self.family(self.model, self.processor)

    def attach(self, trigger: str | Trigger = "never", source: Path | None = None, **settings: Any) -> Memory:
        """Memory whose every trained tensor has an effect, or the trained one in ``source``."""
        packs, wanted = self.backbone.packs, None if source else config(**settings)
        if self.named is not None:
            memory = attach(self.model, self.processor, source, config=wanted, backbone=self.named)
        else:
            memory = self._attach(source, wanted)
        self.backbone = memory.backbone
        self.backbone.packs = packs
        memory.trigger = trigger
        if source is None:
            awaken(memory)
        return memory

    def _attach(self, source: Path | None, settings: MemoryConfig | None) -> Memory:
        # What ``attach`` does, for a class that no entry point names.
        stored = checkpoint.read(source, self.backbone) if source is not None else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            memory = put_on(self.backbone, settings or (stored.config if stored else MemoryConfig()))
        if stored:
            stored.fill(memory.trained())
        return memory

    def weights(self) -> dict[str, Tensor]:
        """Copies of the base's own weights."""
        return {name: own.clone() for name, own in self.model.state_dict().items()}

    def inputs(self, *questions: Question) -> Any:
        """What ``generate`` takes, for prompts of different lengths."""
        return self.backbone.inputs([text for text, _ in questions], [images for _, images in questions])

    def generate(self, *questions: Question, **options: Any) -> Any:
        """``generate`` on questions, greedy, with scores and raw logits; ``answers`` (B, A) holds the new ids."""
        inputs = self.inputs(*questions)
        plain = {"max_new_tokens": 14, "do_sample": False, "output_logits": True, "output_scores": True}
        options = plain | NO_END | options
        output = self.model.generate(**inputs, return_dict_in_generate=True, **options)
        output["answers"] = output.sequences[:, inputs["input_ids"].shape[1] :]
        return output
