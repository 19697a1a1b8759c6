"""The control that a sceptic asks for first: the same trained vectors every time, whatever is seen and written."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vismem_core.base.backbone import Backbone
from vismem_core.config import FormerConfig, Kind
from vismem_core.memory.former import MemoryContext, MemoryFormer


class ConstantFormer(MemoryFormer):
    """A soft prompt in memory's place: N trained vectors. With one vector, it is a functional token's embedding."""

    def __init__(self, kind: Kind, backbone: Backbone, config: FormerConfig) -> None:
        super().__init__(kind, backbone, config)
        self.precision = backbone.dtype
        self.scale = backbone.embedding_scale()
        self.vectors = nn.Parameter(torch.randn(config.length, backbone.width).to(backbone.device))

    @property
    def early(self) -> bool:
        return True

    def forward(self, context: MemoryContext) -> Tensor:
        return (self.vectors * self.scale).to(self.precision).expand(len(context.rows), -1, -1)
