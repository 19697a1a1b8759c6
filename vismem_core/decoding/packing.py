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
from einops import rearrange
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache

from .room import RoomCache, rows_of

NAME = "vismem_packed"
Group = tuple[Sequence[int], int]
"""Rows, and how many tokens each of them has."""


class Packing:
    """How the tokens of one packed pass belong to rows.

    Args:
        cache: aimed at what the pass writes (:meth:`RoomCache.aim`).
        groups: rows and their number N of latents; a row is in at most one group.
        riders: rows and their number E of riders.
    """

    def __init__(self, cache: RoomCache, groups: Sequence[Group], riders: Sequence[Group] = ()) -> None:
        self.cache, self.groups, self.riders = cache, groups, riders
        self.mask = cache.mask  # of the last tokens, which see all that their rows hold
        self.layer: Any = None  # the one that is being computed, with keys and values of its riders
        self.aside: list[Tensor] = []
        starts = cache.starts()
        self._last = cache.ends - 1
        rows, columns = [torch.arange(len(starts), device=starts.device)], [self._last]
        for own, length in groups:
            index = torch.as_tensor(own, device=starts.device)
            rows.append(index.repeat_interleave(length))
            columns.append((starts[index, None] + torch.arange(length, device=starts.device)).flatten())
        self._rows, self._columns = torch.cat(rows), torch.cat(columns)

    def deal(self, packed: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """(M, ...) -> the last tokens (B, 1, ...), each group's latents (R, N, ...), and riders (R, E, ...)."""
        sizes = [(len(rows), length) for rows, length in (*self.groups, *self.riders)]
        last, *parts = packed.split([len(self._last), *(rows * length for rows, length in sizes)])
        dealt = [own.unflatten(0, size) for own, size in zip(parts, sizes, strict=True)]
        return last[:, None], dealt[: len(self.groups)], dealt[len(self.groups) :]

    def slices(self) -> list[slice]:
        """Where each group of riders stands among the packed tokens."""
        start = len(self._last) + sum(len(rows) * length for rows, length in self.groups)
        found = []
        for rows, length in self.riders:
            found.append(slice(start, start + len(rows) * length))
            start += len(rows) * length
        return found

    def write(self, layer: Any, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put what is packed (1, heads, M, w) where it belongs, riders aside; what the pass may look at in all."""
        self.layer, self.aside = layer, [keys, values]
        written = len(self._rows)
        layer.write(
            self._rows[:, None],
            self._columns[:, None],
            *(own[0, :, :written].transpose(0, 1)[:, :, None] for own in (keys, values)),
        )
        seen: tuple[Tensor, Tensor] = layer.view()
        return seen

    def attend(self, module: nn.Module, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        """Packed queries (1, heads, M, w) over the cache -> (1, M, heads, w)."""
        last, latents, riders = self.deal(query[0].transpose(0, 1))
        everyone = list(range(len(self._last)))
        out = [_attention(last, keys, values, self._seen(everyone, self._last[:, None], query.device), scaling)]
        for (rows, length), own in zip(self.groups, latents, strict=True):
            index = torch.as_tensor(rows, device=self._last.device)
            columns = self.cache.starts()[index, None] + torch.arange(length, device=index.device)
            seen = self._seen(rows, columns, query.device)
            out.append(_attention(own, rows_of(keys, rows), rows_of(values, rows), seen, scaling))
        if riders:
            out += self._attend_riders(riders, keys, values, scaling)
        return torch.cat([own.flatten(0, 1) for own in out])[None]

    def _seen(self, rows: Sequence[int], columns: Tensor, device: torch.device) -> Tensor:
        """What tokens at ``columns`` (R, T) of ``rows`` may look at in the layer, (R, 1, T, K)."""
        length, offset = self.layer.get_mask_sizes(self.cache.coming)
        places = torch.arange(offset, offset + length, device=columns.device)
        seen = rows_of(self.mask[:, offset : offset + length], rows)[:, None] & (places <= columns[..., None])
        if self.layer.window is not None:
            seen &= places > columns[..., None] - self.layer.window
        return seen[:, None].to(device)

    def _attend_riders(self, riders: list[Tensor], keys: Tensor, values: Tensor, scaling: float) -> list[Tensor]:
        own_keys, own_values = (self.deal(own[0].transpose(0, 1))[2] for own in self.aside)
        out = []
        for at, (rows, length) in enumerate(self.riders):
            index = torch.as_tensor(rows, device=self._last.device)
            steps = torch.arange(length, device=index.device)
            seen = self._seen(rows, self._last[index, None] + 1 + steps, keys.device)
            behind = seen.new_ones(length, length).tril().expand(len(rows), 1, -1, -1)
            all_keys = torch.cat([rows_of(keys, rows), own_keys[at].transpose(1, 2)], dim=-2)
            all_values = torch.cat([rows_of(values, rows), own_values[at].transpose(1, 2)], dim=-2)
            out.append(_attention(riders[at], all_keys, all_values, torch.cat([seen, behind], dim=-1), scaling))
        return out

    @contextmanager
    def on(self, decoder: nn.Module) -> Iterator[DynamicCache]:
        """Let ``decoder`` take packed tokens, on the cache given inside the context."""
        config: Any = decoder.config
        before = config._attn_implementation
        config._attn_implementation = NAME
        try:
            yield _PackedCache(self)
        finally:
            config._attn_implementation = before


class _PackedCache(DynamicCache):
    def __init__(self, packing: Packing) -> None:
        super().__init__()
        self.layers, self.packing = packing.cache.layers, packing  # type: ignore[assignment]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return self.packing.write(self.layers[layer_idx], key_states, value_states)


def _attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Queries (R, T, heads, w) -> (R, T, heads, w); queries that share a key are tokens of one sequence to torch."""
    shared = query.shape[2] // keys.shape[1]
    packed = rearrange(query, "r t (h g) w -> r h (g t) w", g=shared)
    out = F.scaled_dot_product_attention(packed, keys, values, attn_mask=mask.repeat(1, 1, shared, 1), scale=scaling)
    return rearrange(out, "r h (g t) w -> r t (h g) w", g=shared)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, packing: Packing, **rest: Any
) -> tuple[Tensor, None]:
    return packing.attend(module, query, key, value, rest["scaling"]), None


AttentionInterface.register(NAME, _attend)
