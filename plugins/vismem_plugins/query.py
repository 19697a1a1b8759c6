"""Query builders: the paper's encoder, a cheaper one in which only the queries attend, and constant queries."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from vismem_core.config import QueryConfig
from vismem_core.memory.query import Ahead, QueryBuilder

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

    def ahead(self, visual: Tensor, mask: Tensor) -> Ahead:
        tokens, blocks = self.enter(visual), [cast("Block", block) for block in self.blocks]
        if not self._deep:  # visual tokens enter every block as they are
            return tuple(states for block in blocks for states in block.pairs(tokens))
        # In the first block they look at each other, and at what was written: the one is known here, and how much it
        # weighs.
        (keys, values), queries = blocks[0].pairs(tokens), blocks[0].queries(tokens)
        return keys, values, tokens, queries, *_attended(queries, keys, values, mask[:, None, None])

    def forward(self, states: Tensor, mask: Tensor, ahead: Ahead = ()) -> Tensor:
        known = ahead[0].shape[2] if ahead else 0
        query = self.initial.expand(len(states), -1, -1)
        tokens = torch.cat([self.enter(states[:, known:]), query], dim=1)
        everything = torch.cat([mask, mask.new_ones(query.shape[:2])], dim=1)[:, None]
        seen = _query_unseen(everything, states.shape[1]) if self._deep else everything
        for depth, block in enumerate(self.blocks):
            first, last = depth == 0, depth == len(self.blocks) - 1
            if self._deep and not last:
                tokens = self._first(tokens, seen, ahead) if ahead and first else block(tokens, tokens, seen)
            else:
                count = tokens.shape[1] - query.shape[1]
                pairs = ahead[2 * depth : 2 * depth + 2] if ahead and not self._deep else None
                looked = block(tokens[:, count:], tokens, everything, pairs)
                tokens = torch.cat([tokens[:, :count], looked], dim=1)
        out: Tensor = self.leave(tokens[:, -query.shape[1] :])
        return out

    @property
    def _deep(self) -> bool:
        """Whether states are transformed on their way to the queries."""
        return self.contextual and len(self.blocks) > 1

    def _first(self, rest: Tensor, seen: Tensor, ahead: Ahead) -> Tensor:
        """The first block, after which visual tokens stand in front of the ``rest`` again."""
        block = cast("Block", self.blocks[0])
        keys, values, visual, queries, mixed, weight = ahead
        count = visual.shape[1]
        own_keys, own_values = block.pairs(rest)
        scores = queries @ own_keys.mT * keys.shape[-1] ** -0.5
        scores = scores.masked_fill(~seen[:, None, :count, count:], float("-inf"))
        shares = torch.cat([weight, scores], dim=-1).softmax(-1)
        visual = block.passed(visual, shares[..., :1] * mixed + shares[..., 1:] @ own_values)
        return torch.cat([visual, block(rest, rest, seen[:, count:], (keys, values))], dim=1)


class CrossQuery(EncoderQuery):
    """Only the queries attend; H enters every layer as it is. About a third of the encoder's cost."""

    contextual = False


class ConstantQuery(QueryBuilder):
    """The control: K trained vectors, whatever was seen and written."""

    def __init__(self, width: int, config: QueryConfig) -> None:
        super().__init__(width, config)
        self.initial = nn.Parameter(torch.randn(config.length, width))
        self.leave = nn.RMSNorm(width)

    def forward(self, states: Tensor, mask: Tensor, ahead: Ahead = ()) -> Tensor:
        query: Tensor = self.leave(self.initial)
        return query.expand(len(states), -1, -1)


def _attended(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Attention (R, heads, T, w) and the logarithm of the weights' sum (R, heads, T, 1), a few queries at a time."""
    mixed, weights = [], []
    scaled, unseen = keys.mT * keys.shape[-1] ** -0.5, torch.finfo(keys.dtype).min * ~mask
    for own in queries.split(64, dim=2):
        scores = own @ scaled + unseen
        top = scores.amax(-1, keepdim=True) if keys.shape[2] else scores.new_zeros(*scores.shape[:-1], 1)
        shares = (scores - top).exp()
        total = shares.sum(-1, keepdim=True).clamp(min=torch.finfo(keys.dtype).tiny)
        mixed.append(shares @ values / total)
        weights.append(top + total.log())
    return torch.cat(mixed, dim=2), torch.cat(weights, dim=2)


def _query_unseen(mask: Tensor, count: int) -> Tensor:
    """The mask (R, 1, S) for each of S tokens, (R, S, S); the first ``count`` see no token after them."""
    seen = mask.repeat(1, mask.shape[-1], 1)
    seen[:, :count, count:] = False
    return seen
