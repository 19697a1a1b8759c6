"""A rival of memory at the same budget: the first N tokens of what the base itself writes when it is to list an image.

Their embeddings leave as pooled visual tokens do, through a learnt linear layer and with their places learnt.
"""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache

from vismem_core.answers.late import split
from vismem_core.base.backbone import Backbone
from vismem_core.config import FormerConfig, Kind
from vismem_core.files.samples import Sample, asked
from vismem_core.memory.former import MemoryContext, Needs

from .visual import PooledFormer

ASKS = "list the cells ."
"""What ``mosaic`` calls a description; the embedded bases know no other."""


class DescribedFormer(PooledFormer):
    """N tokens of a description, by greedy decoding after what the row has read: its images alone, where questions come
    after memory. Its end token fills the rest."""

    def __init__(self, kind: Kind, backbone: Backbone, config: FormerConfig) -> None:
        super().__init__(kind, backbone, config)
        vars(self)["backbone"] = backbone  # no submodule of this one
        sample = Sample("", (Image.new("RGB", (56, 56)),), ASKS, "", late=True)
        _, (self.asks,) = split(backbone, [sample], backbone.inputs(*asked([sample])))

    @property
    def early(self) -> bool:
        return False

    @property
    def needs(self) -> Needs:
        return Needs(history=True)

    def forward(self, context: MemoryContext) -> Tensor:
        backbone: Backbone = vars(self)["backbone"]
        embeds = backbone.embed(self._written(backbone, context)).float()
        left: Tensor = self.leave(embeds + self.places[: embeds.shape[1]])
        return left.to(self.precision)

    @torch.no_grad()
    def _written(self, backbone: Backbone, context: MemoryContext) -> Tensor:
        """Ids (R, N)."""
        history = context.history
        assert history is not None
        cache = DynamicCache(config=backbone.model.config)
        asks = torch.tensor([self.asks] * len(history.embeds), device=history.embeds.device)
        # The description is asked for in the place of the invocation token, which the base does not know.
        embeds = torch.cat([history.embeds[:, :-1], backbone.embed(asks).to(history.embeds)], dim=1)
        mask = torch.cat([history.mask[:, :-1], history.mask.new_ones(asks.shape)], dim=1)
        steps = torch.arange(asks.shape[1], device=asks.device)
        positions = torch.cat([history.positions[..., :-1], history.positions[..., -1:] + steps], dim=-1)
        written: list[Tensor] = []
        ended = torch.zeros(len(asks), dtype=torch.bool, device=asks.device)
        while True:
            states = backbone.continue_(embeds, mask, positions, cache)
            token = backbone.logits(states[:, -1]).argmax(-1).masked_fill(ended, backbone.end_of_turn)
            written.append(token)
            if len(written) == self.config.length:
                return torch.stack(written, dim=1)
            ended |= token == backbone.end_of_turn
            embeds = backbone.embed(token)[:, None].to(embeds)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            positions = positions[..., -1:] + 1
