"""Formers that leave the base's towers alone: two small stand-alone encoders."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vismem_core.base.backbone import Backbone
from vismem_core.config import FormerConfig, Kind
from vismem_core.memory.former import MemoryContext, MemoryFormer

from ..attention import Block


class TransformerFormer(MemoryFormer):
    """[Q, M_init] attend to the states in a narrow transformer; M is its last N outputs, at text scale.

    Short memory looks at the visual tokens alone, long memory at what was written since as well.
    """

    def __init__(self, kind: Kind, backbone: Backbone, config: FormerConfig) -> None:
        super().__init__(kind, backbone, config)
        width = backbone.width
        inner = min(width, 512) // 4 * 4
        self.precision = backbone.dtype
        self.enter = nn.Sequential(nn.RMSNorm(width), nn.Linear(width, inner))
        self.ask = nn.Linear(width, inner)
        self.initial = nn.Parameter(torch.randn(config.length, inner))
        self.blocks = nn.ModuleList(Block(inner, 4) for _ in range(config.layers))
        self.leave = nn.Sequential(nn.LayerNorm(inner), nn.Linear(inner, width), nn.RMSNorm(width))
        self.gain = nn.Parameter(torch.full((width,), backbone.embedding_scale()))
        self.to(backbone.device)

    @property
    def early(self) -> bool:
        return True

    def forward(self, context: MemoryContext) -> Tensor:
        states, mask = context.states, context.mask
        if self.kind == "short":
            states, mask = states[:, : context.visual], mask[:, : context.visual]
        states, query = self.enter(states), self.ask(context.query)
        memory = self.initial + query.mean(1, keepdim=True)
        tokens = torch.cat([query, memory], dim=1)
        everything = torch.cat([mask, mask.new_ones(tokens.shape[:2])], dim=1)
        for block in self.blocks:
            tokens = block(tokens, torch.cat([states, tokens], dim=1), everything[:, None])
        latents: Tensor = self.leave(tokens[:, -self.config.length :])
        return (latents * self.gain).to(self.precision)
