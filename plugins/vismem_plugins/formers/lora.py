"""The paper's formers: LoRA on the vision encoder (F_s) and on the language model (F_l), Eq. 6 and Sec. 3.3.

Where the paper leaves a choice open:

- X: with ``context="cache"`` the extra tokens [Q, M_init] attend to what the base already computed and the adapter
  is on for them alone; with ``context="recompute"`` the tower runs over its context again with the adapter on.
- Scale: an output gain per channel is learnt. Short memory starts as the projector gives it, like an image token;
  long memory starts at the rms of the embedding table.
- Memory leaves through a linear layer that starts as the identity. A frozen tower's outputs have a large common part,
  and an adapter on q and v turns them little: without this layer training tends to latents that are the same whatever
  was seen and asked.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from vismem_core.base.adapters import Adapter
from vismem_core.base.backbone import Backbone
from vismem_core.base.vision import VisionStates
from vismem_core.config import FormerConfig, Kind
from vismem_core.memory.former import MemoryContext, MemoryFormer, Needs, RidingFormer


def lora(kind: Kind, backbone: Backbone, config: FormerConfig) -> MemoryFormer:
    """The LoRA former of ``kind``."""
    return VisionLora(kind, backbone, config) if kind == "short" else LanguageLora(kind, backbone, config)


class _LoraFormer(MemoryFormer):
    def __init__(self, kind: Kind, backbone: Backbone, config: FormerConfig) -> None:
        super().__init__(kind, backbone, config)
        vars(self)["backbone"] = backbone  # no submodule of this one
        targets = backbone.lora_targets[kind]
        self.adapter = Adapter(backbone.model, kind, targets, config.rank, config.alpha, config.dropout)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return self.adapter.parameters()

    def train(self, mode: bool = True) -> _LoraFormer:
        super().train(mode)
        self.adapter.train(mode)
        return self

    def detach(self) -> None:
        self.adapter.eject()


class VisionLora(_LoraFormer):
    """F_s: [Q, M_init] through the vision encoder, M through the model's own projector.

    Q lives in width d and enters through one linear layer (d -> D). A projector that merges r encoder tokens into
    one language token gets N * r memory tokens. Besides standing in front of M_init, the queries are mixed into it:
    an encoder trained on patches alone hardly carries the question from one token to the next.
    """

    def __init__(self, kind: Kind, backbone: Backbone, config: FormerConfig) -> None:
        super().__init__(kind, backbone, config)
        width, count = backbone.vision_width, config.length * backbone.merge
        self.count = count
        self.enter = nn.Linear(backbone.width, width, device=backbone.vision_device)
        self.initial = nn.Parameter(torch.randn(count, width).to(backbone.vision_device))
        self.leave = _identity(backbone.width, backbone.vision_device)
        self.gain = nn.Parameter(torch.ones(backbone.width, device=backbone.vision_device))

    @property
    def needs(self) -> Needs:
        again = self.config.context == "recompute"
        return Needs(vision_cache=not again, vision_inputs=again)

    @property
    def early(self) -> bool:
        return True

    def forward(self, context: MemoryContext) -> Tensor:
        backbone: Backbone = vars(self)["backbone"]
        query = self.enter(context.query.to(self.initial.device))
        memory = self.initial + query.mean(1, keepdim=True)
        extra = torch.cat([query, memory], dim=1).to(backbone.vision_dtype)
        with self.adapter.on():
            states = self._states(backbone, context)
            extra = backbone.carry(extra, states, context.rows)
        latents = backbone.project(extra[:, -self.count :])
        left: Tensor = self.leave(latents.to(self.gain.device, torch.float32)) * self.gain
        return left.to(backbone.device, backbone.dtype)

    def _states(self, backbone: Backbone, context: MemoryContext) -> VisionStates:
        if self.config.context == "cache":
            return context.vision
        again = VisionStates(rows=context.vision.rows)
        with backbone.record(again, keep=True, inputs=False):
            for inputs in context.vision.inputs:
                backbone.encode(inputs)
        return again


class LanguageLora(_LoraFormer, RidingFormer):
    """F_l: [Q, M_init] through the language model, after everything it has in its context."""

    def __init__(self, kind: Kind, backbone: Backbone, config: FormerConfig) -> None:
        super().__init__(kind, backbone, config)
        scale = backbone.embedding_scale()
        self.initial = nn.Parameter(scale * torch.randn(config.length, backbone.width, device=backbone.device))
        self.enter = nn.Parameter(torch.full((backbone.width,), scale, device=backbone.device))
        self.leave = _identity(backbone.width, backbone.device)
        self.gain = nn.Parameter(torch.full((backbone.width,), scale, device=backbone.device))

    @property
    def needs(self) -> Needs:
        return Needs(history=self.config.context == "recompute")

    def forward(self, context: MemoryContext) -> Tensor:
        backbone: Backbone = vars(self)["backbone"]
        extra = self.rider(context.query)
        steps = torch.arange(extra.shape[1], device=context.next_position.device)
        positions = context.next_position + steps
        if context.standing is not None:
            positions = torch.cat([positions[..., : -self.config.length], context.standing], dim=-1)
        mask = context.attention_mask
        cache: DynamicCache | None = context.cache
        ones = mask.new_ones(extra.shape[:2])
        if self.config.context == "recompute":
            assert context.history is not None
            extra = torch.cat([context.history.embeds, extra], dim=1)
            positions = torch.cat([context.history.positions, positions], dim=-1)
            mask, cache = context.history.mask, None
        mask = torch.cat([mask, ones], dim=1)
        with self.adapter.on():
            hidden = backbone.continue_(extra, mask, positions, cache)
        return self.read(hidden)

    @property
    def rides(self) -> bool:
        return self.config.context == "cache"

    def rider(self, query: Tensor) -> Tensor:
        memory = self.initial.expand(len(query), -1, -1)
        backbone: Backbone = vars(self)["backbone"]
        return torch.cat([query * self.enter, memory], dim=1).to(backbone.dtype)

    def read(self, hidden: Tensor) -> Tensor:
        latents = nn.functional.rms_norm(hidden[:, -self.config.length :].float(), (hidden.shape[-1],))
        left: Tensor = self.leave(latents) * self.gain
        return left.to(hidden.dtype)

    def on(self, tokens: slice | Tensor) -> AbstractContextManager[None]:
        return self.adapter.on(tokens)


def _identity(width: int, device: torch.device) -> nn.Linear:
    layer = nn.Linear(width, width, bias=False, device=device)
    nn.init.eye_(layer.weight)
    return layer
