"""One forward pass in which rows take in their next token, some latents before it, some riders behind it.

The new tokens of all rows form one sequence of M: the last token of every row, then latents, then riders, the tokens
of which memory is formed. What works token by token never notices; attention and the cache deal the tokens out to
their rows again. Riders see their row's cache and its token, and leave nothing in the cache. So neither insertion nor
formation is a pass of its own beside the neighbours', the weights are read once, and no row computes on padding.
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
Group = tuple[Sequence[int], int]
"""Rows, and how many tokens each of them has."""


class Packing:
    """How the tokens of one packed pass belong to rows.

    Args:
        mask: (B, W) over the cache as it will be after the pass.
        groups: rows and their number N of latents; a row is in at most one group.
        riders: rows and their number E of riders.
    """

    def __init__(self, mask: Tensor, groups: Sequence[Group], riders: Sequence[Group] = ()) -> None:
        self.mask, self.groups, self.riders = mask, groups, riders
        self.aside: list[Tensor] = []  # keys and values of the riders in the layer that is being computed

    def deal(self, packed: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """(M, ...) -> the last tokens (B, 1, ...), each group's latents (R, N, ...), and riders (R, E, ...)."""
        sizes = [(len(rows), length) for rows, length in (*self.groups, *self.riders)]
        last, *parts = packed.split([len(self.mask), *(rows * length for rows, length in sizes)])
        dealt = [own.unflatten(0, size) for own, size in zip(parts, sizes, strict=True)]
        return last[:, None], dealt[: len(self.groups)], dealt[len(self.groups) :]

    def slices(self) -> list[slice]:
        """Where each group of riders stands among the packed tokens."""
        start = len(self.mask) + sum(len(rows) * length for rows, length in self.groups)
        found = []
        for rows, length in self.riders:
            found.append(slice(start, start + len(rows) * length))
            start += len(rows) * length
        return found

    def grow(self, whole: Tensor, packed: Tensor) -> Tensor:
        """Keys or values of all rows (B, heads, W', w) with those of the packed tokens (1, heads, M, w) added.

        Returns:
            (B, heads, W, w)
        """
        last, latents, _ = self.deal(packed[0].transpose(0, 1))
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
        last, latents, riders = self.deal(query[0].transpose(0, 1))
        mask = self.mask.to(query.device, torch.bool)[:, None, None]
        out = [sdpa_attention_forward(module, last.transpose(1, 2), keys, values, mask, **settings)[0]]
        for (rows, length), own in zip(self.groups, latents, strict=True):
            index = torch.as_tensor(rows, device=query.device)
            seen = mask.new_ones(length, mask.shape[-1]).tril(mask.shape[-1] - 1 - length)
            pairs = keys[index], values[index], mask[index] & seen
            out.append(sdpa_attention_forward(module, own.transpose(1, 2), *pairs, **settings)[0])
        if riders:
            out += self._attend_riders(module, riders, keys, values, mask, settings)
        return torch.cat([own.flatten(0, 1) for own in out])[None]

    def _attend_riders(
        self, module: nn.Module, riders: list[Tensor], keys: Tensor, values: Tensor, mask: Tensor, settings: Any
    ) -> list[Tensor]:
        own_keys, own_values = (self.deal(own[0].transpose(0, 1))[2] for own in self.aside)
        out = []
        for at, (rows, length) in enumerate(self.riders):
            index = torch.as_tensor(rows, device=mask.device)
            behind = mask.new_ones(length, length).tril().expand(len(rows), 1, -1, -1)
            seen = torch.cat([mask[index].expand(-1, -1, length, -1), behind], dim=-1)
            all_keys = torch.cat([keys[index], own_keys[at].transpose(1, 2)], dim=-2)
            all_values = torch.cat([values[index], own_values[at].transpose(1, 2)], dim=-2)
            queries = riders[at].transpose(1, 2)
            out.append(sdpa_attention_forward(module, queries, all_keys, all_values, seen, **settings)[0])
        return out

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
        self.packing.aside = [key_states, value_states]
        layer.keys = self.packing.grow(layer.keys, key_states)
        layer.values = self.packing.grow(layer.values, value_states)
        return layer.keys, layer.values


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, packing: Packing, **rest: Any
) -> tuple[Tensor, None]:
    return packing.attend(module, query, key, value, scaling=rest["scaling"]), None


AttentionInterface.register(NAME, _attention)
