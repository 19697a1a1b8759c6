"""One forward pass in which rows take in their next token, some latents before it, some riders behind it.

The new tokens of all rows form one sequence of M: the last token of every row, then latents, then riders, the tokens
of which memory is formed. What works token by token never notices; attention and the cache deal the tokens out to
their rows again. Riders see their row's cache and its token; they stand behind its end, where the row's next tokens
will be written over them. So neither insertion nor formation is a pass of its own beside the neighbours', the weights
are read once, and no row computes on padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache

from .columns import rows_of
from .room import RoomCache

NAME = "vismem_packed"
Group = tuple[Sequence[int], int]
"""Rows, and how many tokens each of them has."""


class Packing:
    """How the tokens of one packed pass belong to rows.

    Args:
        cache: aimed at what the pass writes (:meth:`RoomCache.aim`), riders beyond it.
        groups: rows and their number N of latents; a row is in at most one group.
        riders: rows and their number E of riders.
    """

    def __init__(self, cache: RoomCache, groups: Sequence[Group], riders: Sequence[Group] = ()) -> None:
        self.cache, self.groups, self.riders = cache, groups, riders
        self._written: dict[int, tuple[Tensor, Any]] = {}  # the keys that a layer gave, and the layer
        self._last = cache.ends - 1
        every = range(len(self._last))
        self._parts: list[tuple[Sequence[int], Tensor]] = [(every, self._last[:, None])]  # rows (R), columns (R, T)
        for first, own in ((cache.starts(), groups), (cache.ends, riders)):
            for rows, length in own:
                steps = torch.arange(length, device=first.device)
                self._parts.append((rows, first[list(rows), None] + steps))
        index = [torch.as_tensor(rows, device=self._last.device) for rows, _ in self._parts]
        self._rows = torch.cat(
            [own.repeat_interleave(at.shape[1]) for own, (_, at) in zip(index, self._parts, strict=True)]
        )
        self._columns = torch.cat([columns.flatten() for _, columns in self._parts])
        self._masks: dict[tuple[int, int | None, torch.device], list[Tensor]] = {}

    def deal(self, packed: Tensor) -> list[Tensor]:
        """(M, ...) -> the last tokens (B, 1, ...), each group's latents (R, N, ...), and riders (R, E, ...)."""
        dealt = packed.split([columns.numel() for _, columns in self._parts])
        return [own.unflatten(0, columns.shape) for own, (_, columns) in zip(dealt, self._parts, strict=True)]

    def ridden(self, packed: Tensor) -> list[Tensor]:
        """(M, ...) -> the riders (R, E, ...) alone."""
        return self.deal(packed)[1 + len(self.groups) :]

    def slices(self) -> list[slice]:
        """Where each group of riders stands among the packed tokens."""
        stops = torch.tensor([0] + [columns.numel() for _, columns in self._parts]).cumsum(0).tolist()
        return [slice(*pair) for pair in pairwise(stops)][1 + len(self.groups) :]

    def write(self, layer: Any, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put what is packed (1, heads, M, w) where it belongs; what the pass may look at in all."""
        packed = (own[0].transpose(0, 1)[:, :, None] for own in (keys, values))
        layer.write(self._rows[:, None], self._columns[:, None], *packed)
        seen: tuple[Tensor, Tensor] = layer.view()
        self._written[id(seen[0])] = seen[0], layer
        return seen

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float, window: int | None = None) -> Tensor:
        """Packed queries (1, heads, M, w) over the cache -> (1, M, heads, w)."""
        layer = self._holder(keys, window)
        shared, out = query.shape[1] // keys.shape[1], []
        dealt, masks = self.deal(query[0].transpose(0, 1)), self._seen(layer, query, keys.shape[2], shared)
        for (rows, _), own, mask in zip(self._parts, dealt, masks, strict=True):
            # Queries that share a key are tokens of one sequence to torch.
            packed = rearrange(own, "r t (h g) w -> r h (g t) w", g=shared)
            own_keys, own_values = rows_of(keys, rows), rows_of(values, rows)
            if layer.prompts is None:
                mixed = F.scaled_dot_product_attention(packed, own_keys, own_values, attn_mask=mask, scale=scaling)
            else:
                mixed = self._over_prompts(layer, rows, packed * scaling, own_keys, own_values, mask)
            out.append(rearrange(mixed, "r h (g t) w -> (r t) (h g) w", g=shared))
        return torch.cat(out)[None]

    def _holder(self, keys: Tensor, window: int | None) -> Any:
        """The layer that keys come from: some layers read what an earlier one gave, perhaps on another device."""
        if id(keys) in self._written:
            return self._written[id(keys)][1]
        return next(own for _, own in reversed(self._written.values()) if own.window == window)

    def _over_prompts(
        self, layer: Any, rows: Sequence[int], queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor
    ) -> Tensor:
        """Scaled queries (R, heads, T, w) over keys that all rows of a prompt share, and over their own.

        To torch the rows of a prompt are tokens of one sequence, so the prompt is read once for all of them.
        """
        prompt_keys, prompt_values = layer.prompts
        assert self.cache.sources is not None
        sources = [self.cache.sources[row] for row in rows]
        runs = [(source, len(list(own))) for source, own in groupby(sources)]
        length, lengths = queries.shape[2], [count for _, count in runs]

        def together(states: Tensor, prompts: Tensor) -> Tensor:
            out = []
            for own, (source, _) in zip(states.split(lengths), runs, strict=True):
                mixed = rearrange(own, "r h t w -> h (r t) w") @ prompts[source]
                out.append(rearrange(mixed, "h (r t) w -> r h t w", t=length))
            return torch.cat(out)

        scores = torch.cat([together(queries, prompt_keys.mT), queries @ keys.mT], dim=-1) + mask
        shares = scores.softmax(-1, dtype=torch.float32).to(values.dtype)
        first, second = shares.split([prompt_keys.shape[2], keys.shape[2]], dim=-1)
        mixed: Tensor = together(first, prompt_values) + second @ values
        return mixed

    def _seen(self, layer: Any, query: Tensor, width: int, shared: int) -> list[Tensor]:
        """What each part may look at of the last K columns, (R, 1, shared * T, K), to be added to the scores."""
        offset = 0 if layer.prompts is not None else self.cache.reach - width
        window = layer.window
        if (told := (offset, window, query.device)) not in self._masks:
            places = torch.arange(offset, self.cache.reach, device=self._last.device)
            held = F.pad(self.cache.mask[:, offset:], (0, self.cache.reach - self.cache.used))
            held = held | (places > self._last[:, None])  # riders
            masks = []
            for rows, columns in self._parts:
                seen = rows_of(held, rows)[:, None] & (places <= columns[..., None])
                if window is not None:
                    seen &= places > columns[..., None] - window
                added = torch.zeros_like(seen, dtype=query.dtype).masked_fill(~seen, float("-inf"))
                masks.append(added[:, None].repeat(1, 1, shared, 1).to(query.device))
            self._masks[told] = masks
        return self._masks[told]

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
        self.layers, self.packing = packing.cache.layers, packing

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return self.packing.write(self.layers[layer_idx], key_states, value_states)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, packing: Packing, **rest: Any
) -> tuple[Tensor, None]:
    return packing.attend(query, key, value, rest["scaling"], rest.get("sliding_window")), None


AttentionInterface.register(NAME, _attend)
