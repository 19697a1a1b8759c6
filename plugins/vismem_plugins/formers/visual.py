"""Rivals of memory at the same budget: N of the visual tokens that the language model was given, pooled or kept.

They leave through a learnt linear layer, as memory does, and what tells their places is learnt too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vismem_core.base.backbone import Backbone
from vismem_core.config import FormerConfig, Kind
from vismem_core.memory.former import MemoryContext, MemoryFormer

PLACES = 4096
"""The most visual tokens of a prompt."""


class PooledFormer(MemoryFormer):
    """N means over stretches of the visual tokens, as adaptive pooling makes them; the same ones again if they are
    fewer."""

    def __init__(self, kind: Kind, backbone: Backbone, config: FormerConfig) -> None:
        super().__init__(kind, backbone, config)
        self.precision = backbone.dtype
        self.places = nn.Parameter(torch.zeros(PLACES, backbone.width))
        self.leave = nn.Linear(backbone.width, backbone.width, bias=False)
        nn.init.eye_(self.leave.weight)
        self.to(backbone.device)

    @property
    def early(self) -> bool:
        return True

    def forward(self, context: MemoryContext) -> Tensor:
        seen = context.states[:, : context.visual]
        weights = self.weights(context, context.mask[:, : context.visual])
        pooled = weights @ (seen + self.places[: seen.shape[1]])
        left: Tensor = self.leave(pooled)
        return left.to(self.precision)

    def weights(self, context: MemoryContext, mask: Tensor) -> Tensor:
        """What each of N vectors takes of each visual token: (R, N, y)."""
        count, rows = self.config.length, []
        for own in mask:
            there = own.nonzero().flatten()
            weight = torch.zeros(count, len(own), device=mask.device)
            for at in range(count if len(there) else 0):
                start, stop = at * len(there) // count, -(-(at + 1) * len(there) // count)
                weight[at, there[start:stop]] = 1 / (stop - start)
            rows.append(weight)
        return torch.stack(rows)


class KeptFormer(PooledFormer):
    """The N visual tokens that the invocation token's state attends to most (by the cosine), in their order; the same
    ones again if they are fewer."""

    def weights(self, context: MemoryContext, mask: Tensor) -> Tensor:
        ends = context.mask.long().cumsum(1).argmax(1)  # rows are padded behind
        last = context.states[torch.arange(len(ends), device=ends.device), ends][:, None]
        scores = torch.cosine_similarity(context.states[:, : context.visual], last, dim=-1).masked_fill(~mask, -2)
        count, rows = self.config.length, []
        for score, own in zip(scores, mask, strict=True):
            best = score.topk(min(count, int(own.sum()))).indices.sort().values
            places = best[torch.arange(count, device=best.device) % max(1, len(best))] if len(best) else best
            weight = torch.zeros(count, len(own), device=mask.device)
            rows.append(weight.index_put((torch.arange(len(places), device=best.device), places), weight.new_ones(())))
        return torch.stack(rows)
