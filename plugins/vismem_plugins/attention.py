"""The pre-norm transformer block that the query builders and the stand-alone formers are made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Pairs = tuple[Tensor, Tensor]


class Block(nn.Module):
    """Tokens attend to a context and pass an MLP, each with a residual.

    Args:
        width: of tokens and context.
        heads: attention heads; they must divide the width.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width, bias=False)  # a bias of keys cancels in the softmax
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor, context: Tensor, mask: Tensor, known: Pairs | None = None) -> Tensor:
        """tokens (R, T, w), context (R, S, w), mask (R, T or 1, S) with False at what is not seen -> (R, T, w).

        Args:
            known: keys and values of the first tokens of the context, which ``context`` leaves out.
        """
        keys, values = self.pairs(context)
        if known is not None:
            keys, values = (torch.cat(own, dim=2) for own in zip(known, (keys, values), strict=True))
        mixed = F.scaled_dot_product_attention(self.queries(tokens), keys, values, attn_mask=mask[:, None])
        return self.passed(tokens, mixed)

    def queries(self, tokens: Tensor) -> Tensor:
        """(R, T, w) -> (R, heads, T, w / heads)."""
        queries: Tensor = rearrange(self.query(self.norm(tokens)), "b l (heads w) -> b heads l w", heads=self.heads)
        return queries

    def pairs(self, context: Tensor) -> Pairs:
        """Keys and values of a context (R, S, w), each (R, heads, S, w / heads)."""
        pairs = self.key_value(self.norm(context))
        keys, values = rearrange(pairs, "b l (two heads w) -> two b heads l w", two=2, heads=self.heads)
        return keys, values

    def passed(self, tokens: Tensor, mixed: Tensor) -> Tensor:
        """The tokens (R, T, w) after what they attended to, (R, heads, T, w / heads)."""
        tokens = tokens + self.out(rearrange(mixed, "b heads l w -> b l (heads w)"))
        out: Tensor = tokens + self.mlp(self.norm_mlp(tokens))
        return out
