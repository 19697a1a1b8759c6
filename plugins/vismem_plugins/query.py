"""Query builders: the paper's encoder, and a cheaper one in which only the queries attend."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vismem_core.config import QueryConfig
from vismem_core.memory.query import QueryBuilder

from .attention import Block


class EncoderQuery(QueryBuilder):
    """B as in Eq. 9-11: a light pre-norm transformer encoder over [H, Q_init], Q its last K outputs.

    Q_init (K, w) is learnt. Q looks at H and Q, H never looks at Q. States keep their meaning but not their scale:
    each is normalised before it enters, since visual tokens and hidden states differ in size. Queries leave with
    rms 1.
    """

    contextual = True
    """Whether H is transformed too."""

    def __init__(self, width: int, config: QueryConfig) -> None:
        super().__init__(width, config)
        inner = config.width or min(width, 256)
        inner -= inner % config.heads
        self.enter = nn.Sequential(nn.RMSNorm(width), nn.Linear(width, inner))
        self.initial = nn.Parameter(torch.randn(config.length, inner) * inner**-0.5)
        self.blocks = nn.ModuleList(Block(inner, config.heads) for _ in range(config.layers))
        self.leave = nn.Sequential(nn.LayerNorm(inner), nn.Linear(inner, width), nn.RMSNorm(width))

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        count, query = states.shape[1], self.initial.expand(len(states), -1, -1)
        tokens = torch.cat([self.enter(states), query], dim=1)
        everything = torch.cat([mask, mask.new_ones(query.shape[:2])], dim=1)[:, None]
        for depth, block in enumerate(self.blocks, start=1):
            if self.contextual and depth < len(self.blocks):
                tokens = block(tokens, tokens, _query_unseen(everything, count))
            else:
                looked = block(tokens[:, count:], tokens, everything)
                tokens = torch.cat([tokens[:, :count], looked], dim=1)
        out: Tensor = self.leave(tokens[:, count:])
        return out


class CrossQuery(EncoderQuery):
    """Only the queries attend; H enters every layer as it is. About a third of the encoder's cost."""

    contextual = False


def _query_unseen(mask: Tensor, count: int) -> Tensor:
    """The mask (R, 1, S) for each of S tokens, (R, S, S); the first ``count`` see no token after them."""
    seen = mask.repeat(1, mask.shape[-1], 1)
    seen[:, :count, count:] = False
    return seen
