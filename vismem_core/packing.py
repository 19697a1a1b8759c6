"""One forward pass in which some rows take in latents before their next token.

The new tokens of all rows form one sequence of M: the last token of every row, then the latents of the rows that take
some in. What works token by token never notices; attention and the cache deal the tokens out to their rows again. An
insertion so reads the weights once instead of twice, and no row computes on padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "vismem_packed"


class Packing:
    """How the tokens of one packed pass belong to rows.

    Args:
        mask: (B, W) over the cache as it will be after the pass.
        groups: rows and their number N of latents; a row is in at most one group.
    """

    def __init__(self, mask: Tensor, groups: Sequence[tuple[Sequence[int], int]]) -> None:
        self.mask, self.groups = mask, groups

    def deal(self, packed: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(M, ...) -> the last tokens (B, 1, ...), and each group's latents (R, N, ...)."""
        last, *latents = packed.split([len(self.mask), *(len(rows) * length for rows, length in self.groups)])
        sizes = [(len(rows), length) for rows, length in self.groups]
        return last[:, None], [own.unflatten(0, size) for own, size in zip(latents, sizes, strict=True)]

    def grow(self, whole: Tensor, packed: Tensor) -> Tensor:
        """Keys or values of all rows (B, heads, W', w) with those of the packed tokens (1, heads, M, w) added.

        Returns:
            (B, heads, W, w)
        """
        last, latents = self.deal(packed[0].transpose(0, 1))
        padding = self.mask.shape[1] - whole.shape[-2] - 1
        whole = F.pad(whole, (0, 0, padding, 1))
        whole[..., -1:, :] = last.transpose(1, 2)
        for (rows, length), own in zip(self.groups, latents, strict=True):
            index = torch.as_tensor(rows, device=whole.device)
            kept = whole[index, :, length:-1]  # the row moves to the left, over its padding
            whole[index, :, :-1] = torch.cat([kept, own.transpose(1, 2)], dim=-2)
        return whole

    def attend(self, module: nn.Module, query: Tensor, keys: Tensor, values: Tensor, **settings: Any) -> Tensor:
        """Packed queries (1, heads, M, w) over the grown cache -> (1, M, heads, w)."""
        last, latents = self.deal(query[0].transpose(0, 1))
        mask = self.mask.to(query.device, torch.bool)[:, None, None]
        out = [sdpa_attention_forward(module, last.transpose(1, 2), keys, values, mask, **settings)[0]]
        for (rows, length), own in zip(self.groups, latents, strict=True):
            index = torch.as_tensor(rows, device=query.device)
            seen = mask.new_ones(length, mask.shape[-1]).tril(mask.shape[-1] - 1 - length)
            pairs = keys[index], values[index], mask[index] & seen
            out.append(sdpa_attention_forward(module, own.transpose(1, 2), *pairs, **settings)[0])
        return torch.cat([own.flatten(0, 1) for own in out])[None]

    @contextmanager
    def on(self, decoder: nn.Module, cache: DynamicCache) -> Iterator[DynamicCache]:
        """Let ``decoder`` take packed tokens, on the cache given inside the context; it writes to ``cache``."""
        config: Any = decoder.config
        before = config._attn_implementation
        config._attn_implementation = NAME
        try:
            yield _PackedCache(cache, self)
        finally:
            config._attn_implementation = before


class _PackedCache(DynamicCache):
    def __init__(self, cache: DynamicCache, packing: Packing) -> None:
        super().__init__()
        self.layers, self.packing = cache.layers, packing

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        layer: Any = self.layers[layer_idx]
        layer.keys = self.packing.grow(layer.keys, key_states)
        layer.values = self.packing.grow(layer.values, value_states)
        return layer.keys, layer.values


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, packing: Packing, **rest: Any
) -> tuple[Tensor, None]:
    return packing.attend(module, query, key, value, scaling=rest["scaling"]), None


AttentionInterface.register(NAME, _attention)
