"""The KV cache of a batch whose rows grow apart.

Room is reserved ahead, in blocks, and every row writes at its own place: one that takes in N latents goes on by N
columns, its neighbours by one. Nothing is shifted, concatenated or copied while tokens are written; what a row may look
at is a mask over the columns (B, W), since those behind a row's end hold nothing and those in front may be padding.

Until rows have grown apart the cache looks to the model like transformers' own, and attention gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from vismem_core.base import cache as kv

BLOCK = 256
"""Columns that are reserved at once."""
STEP = 64
"""Where it is known how many columns come, room is a multiple of this: all of it may be read in every pass."""


class RoomCache(DynamicCache):
    """Rows of a cache, one perhaps several times, in room of their own.

    Args:
        cache: what the rows have in common with others; it stays as it is.
        mask: (B, W) over ``cache``.
        rows: by default all of them.
        ahead: columns that rows may come to write, where that is known; a block or two by default.
        shared: rows of one prompt, which stand together, hold its columns once. Only a packed pass can read them then.

    Attributes:
        used: columns that some row has written, W.
        ends: (B,), the next column of each row.
        ragged: whether rows end in different columns.
        whole: whether every layer holds all tokens: none has a sliding window, or a state instead.
        sources: each row's row of the prompts' columns, where these are shared, or None.
        still: whether passes look at all the room, written or not, so that their shapes stay as they are.
    """

    layers: list[Any]

    def __init__(
        self,
        cache: DynamicCache,
        mask: Tensor,
        rows: Sequence[int] | None = None,
        ahead: int = 0,
        shared: bool = False,
    ) -> None:
        super().__init__()
        self.layers = []
        rows = list(range(len(mask))) if rows is None else rows
        self.used, self.ragged, self.whole = mask.shape[1], False, kv.whole(cache)
        self.still, self.sources = False, list(rows) if shared else None
        room = _blocks(self.used + ahead, STEP) if ahead else _blocks(self.used + BLOCK)
        self._seen = _roomy(mask.bool()[torch.as_tensor(rows, device=mask.device)], room, dim=1)
        self.ends = torch.full((len(rows),), self.used, device=mask.device)
        self._lengths = [self.used] * len(rows)
        self._coming, self._reach = 0, self.used
        self._columns: dict[torch.device, tuple[Tensor, Tensor]] = {}
        for layer in cache.layers:
            own: Any = kv.StateLayer.of(layer, rows) if kv.stateful(layer) else layer
            self.layers.append(_RoomLayer(self, layer, rows, room) if isinstance(layer, DynamicLayer) else own)

    @property
    def grown(self) -> list[_RoomLayer]:
        """The layers with room for keys and values."""
        return [layer for layer in self.layers if isinstance(layer, _RoomLayer)]

    @property
    def windowed(self) -> bool:
        """Whether layers have sliding windows."""
        return any(layer.window is not None for layer in self.grown)

    @property
    def reach(self) -> int:
        """Columns that the coming pass looks at, with those it writes beyond the rows' ends."""
        return self._reach

    @property
    def mask(self) -> Tensor:
        """What rows may look at, (B, W), with what the coming pass writes."""
        return self._seen[:, : self.used]

    def seen(self, window: int | None) -> Tensor:
        """What the last tokens of the rows may look at, (B, K), in layers with a window or none.

        A window counts from the rows' own places.
        """
        first = max(layer.first for layer in self.grown if layer.window == window)
        stop = self._seen.shape[1] if self.still else self.used
        places = torch.arange(first, stop, device=self.ends.device)
        seen = self._seen[:, first:stop]
        return seen if window is None else seen & (places > self.ends[:, None] - 1 - window)

    def aim(self, counts: int | Sequence[int], beyond: Sequence[int] = ()) -> None:
        """The coming pass writes so many tokens to every row, and so many ``beyond`` that are gone after it."""
        rows = len(self._lengths)
        same = isinstance(counts, int) and not self.ragged
        counts = [counts] * rows if isinstance(counts, int) else list(counts)
        starts = self.ends
        self._starts, self._same, self._columns = starts, same, {}
        self._coming = max(counts)
        self._lengths = [own + count for own, count in zip(self._lengths, counts, strict=True)]
        before, self.used = self.used, max(self._lengths)
        self.ragged = min(self._lengths) != self.used
        self._reach = max([own + more for own, more in zip(self._lengths, beyond or [0] * rows, strict=True)])
        self._reserve()
        if same:
            self._seen[:, before : self.used] = True
            self.ends = starts + counts[0]
            return
        ends = enumerate(zip(self._lengths, counts, strict=True))
        written = [(row, at) for row, (end, count) in ends for at in range(end - count, end)]
        self._seen[torch.tensor(written, device=starts.device).unbind(1)] = True
        self.ends = starts + torch.tensor(counts, device=starts.device)

    def columns(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rows (B, 1) and columns (B, T) of the coming T tokens of every row."""
        if device not in self._columns:
            rows = torch.arange(len(self._lengths), device=device)[:, None]
            steps = torch.arange(self._coming, device=device)
            self._columns[device] = rows, self._starts.to(device)[:, None] + steps
        return self._columns[device]

    def starts(self) -> Tensor:
        """The column (B,) of each row's first token of the coming pass."""
        return self._starts

    def landed(self) -> None:
        """The pass is over."""
        self._coming, self._reach = 0, self.used

    @contextmanager
    def held(self) -> Iterator[None]:
        """The pass inside the context looks at all the room (:attr:`still`)."""
        self.still = True
        try:
            for layer in self.grown:
                self.columns(layer.device)
                layer.stay()
            yield
        finally:
            self.still = False

    def back(self, columns: int) -> None:
        """Give up what the last pass wrote, so many columns of every row."""
        self.used, self.ends = self.used - columns, self.ends - columns
        self._lengths = [own - columns for own in self._lengths]
        self._seen[:, self.used :] = False
        self._coming, self._reach = 0, self.used

    def hide(self, columns: Tensor) -> bool:
        """Let rows not look at ``columns`` (B, W) any more; whether columns were given up, and rows stand anew.

        They are given up unless a layer has a sliding window, whose distances count in columns, or the prompts' columns
        are shared. What is left stands at the front of its row.
        """
        seen = self._seen[:, : self.used] & ~columns
        self._seen[:, : self.used] = seen
        lengths = seen.sum(1)
        most = int(lengths.max())
        if most == self.used or not self.whole or self.sources is not None:
            return False
        order = seen.long().argsort(dim=1, descending=True, stable=True)[:, :most]
        for layer in self.grown:
            layer.reorder(order)
        self.used, self.ends = most, lengths
        self._lengths = lengths.tolist()
        self.ragged = min(self._lengths) != most
        self._seen = _roomy(torch.arange(most, device=lengths.device) < lengths[:, None], _blocks(most + BLOCK), dim=1)
        return True

    def select(self, rows: Sequence[int]) -> RoomCache:
        """The given rows alone, copied."""
        other: RoomCache = RoomCache.__new__(RoomCache)
        vars(other).update(vars(self))
        index = torch.as_tensor(rows, device=self.ends.device)
        other._lengths = [self._lengths[row] for row in rows]
        other.used = max(other._lengths)
        other.ragged = min(other._lengths) != other.used
        other.ends, other._seen = self.ends[index], self._seen[index]
        other._columns = {}
        other.sources = None if self.sources is None else [self.sources[row] for row in rows]
        other.layers = [_of_rows(layer, other, rows) for layer in self.layers]
        return other

    def together(self, rows: Sequence[int]) -> tuple[DynamicCache, Tensor]:
        """Some rows as transformers keep them, padded on the left, and their mask; appending leaves this one alone."""
        index = torch.as_tensor(rows, device=self.ends.device)
        everyone = list(rows) == list(range(len(self._lengths)))
        width = max(self._lengths[row] for row in rows)
        result = DynamicCache()
        if all(self._lengths[row] == width for row in rows):
            result.layers = [_plain(layer, None if everyone else rows, None, width) for layer in self.layers]
            seen = self._seen[:, :width]
            return result, (seen if everyone else seen[index]).long()
        places = torch.arange(width, device=index.device) - (width - self.ends[index])[:, None]
        result.layers = [_plain(layer, rows, places, width) for layer in self.layers]
        return result, (self._seen[index].gather(1, places.clamp(min=0)) & (places >= 0)).long()

    def put(self, cache: DynamicCache, rows: Sequence[int], count: int) -> None:
        """Write the last ``count`` tokens of ``rows``, which were continued elsewhere; :meth:`aim` says where."""
        index = torch.as_tensor(rows, device=self.ends.device)
        columns = self._starts[index][:, None] + torch.arange(count, device=index.device)
        for layer, other in zip(self.grown, kv.layers(cache), strict=True):
            layer.write(index[:, None], columns, other.keys[..., -count:, :], other.values[..., -count:, :])
        for layer, other in zip(kv.states(self), kv.states(cache), strict=True):
            layer.put(other, rows)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns in front of the coming pass."""
        return self.used - self._coming

    def _reserve(self) -> None:
        if self._reach > self._seen.shape[1]:
            room = _blocks(self._reach + BLOCK)
            self._seen = _roomy(self._seen, room, dim=1)
            for layer in self.grown:
                layer.reserve(room)


class _RoomLayer(DynamicLayer):
    """Keys and values (B, heads, room, w) of one layer.

    Attributes:
        first: the column that the first one is; more than 0 where a sliding window had passed others by, or these are
            the prompts'.
        prompts: keys and values (P, heads, first, w) of the prompts, where rows share them.
    """

    keys: Tensor
    values: Tensor
    prompts: tuple[Tensor, Tensor] | None

    def __init__(self, cache: RoomCache, layer: Any, rows: Sequence[int], room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cache, self.is_initialized = cache, True
        self._staying: Tensor | None = None
        self.window = int(layer.sliding_window) if isinstance(layer, DynamicSlidingWindowLayer) else None
        self.is_sliding = self.window is not None
        self.device, self.first = layer.keys.device, cache.used - layer.keys.shape[-2]
        self.prompts, pairs = None, (layer.keys, layer.values)
        if cache.sources is not None:
            self.prompts, self.first = pairs, cache.used
            pairs = (layer.keys[:, :, :0], layer.values[:, :, :0])
        self.keys, self.values = (_roomy(rows_of(own, rows), room - self.first, dim=2) for own in pairs)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        cache = self.cache
        if cache.still:
            self.write(*cache.columns(self.device), key_states, value_states)
            return self.keys, self.values
        if cache._same:
            stop = cache.used - self.first
            self.keys[:, :, stop - cache._coming : stop] = key_states
            self.values[:, :, stop - cache._coming : stop] = value_states
        else:
            self.write(*cache.columns(key_states.device), key_states, value_states)
        return self.view()

    def view(self) -> tuple[Tensor, Tensor]:
        """The keys and values that the coming pass may look at."""
        length, offset = self.get_mask_sizes(self.cache._coming)
        part = slice(offset - self.first, offset - self.first + length)
        return self.keys[:, :, part], self.values[:, :, part]

    def write(self, rows: Tensor, columns: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write keys and values (R, heads, T, w) at rows (R, 1) and columns (R, T)."""
        rows, columns = rows.to(self.device), columns.to(self.device) - self.first
        for own, new in ((self.keys, keys), (self.values, values)):
            own.transpose(1, 2)[rows, columns] = new.transpose(1, 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        used = self.cache._reach if self.cache._coming else self.cache.used + query_length
        if self.window is None or self.cache.ragged or self.cache._reach > self.cache.used:
            return used - self.first, self.first
        length = min(used - self.first, self.window - 1 + query_length)
        return length, used - length

    def get_seq_length(self) -> int:
        return self.cache.get_seq_length()

    def stay(self) -> None:
        """Compiled passes may write to where the keys and values are; CUDA graphs would write to copies else."""
        if self._staying is not self.keys:
            self._staying = self.keys
            for states in (self.keys, self.values):
                torch._dynamo.mark_static_address(states)

    def reserve(self, columns: int) -> None:
        """Make room for so many columns."""
        self.keys, self.values = (_roomy(own, columns - self.first, dim=2) for own in (self.keys, self.values))

    def reorder(self, order: Tensor) -> None:
        """Keep other columns (B, W) in that order."""
        order = order.to(self.device)
        rows = torch.arange(len(order), device=self.device)[:, None]
        self.keys, self.values = (
            _roomy(own.transpose(1, 2)[rows, order].transpose(1, 2), _blocks(order.shape[1] + BLOCK), dim=2)
            for own in (self.keys, self.values)
        )

    def select(self, cache: RoomCache, rows: Sequence[int]) -> _RoomLayer:
        """The given rows alone, for another cache."""
        other: _RoomLayer = _RoomLayer.__new__(_RoomLayer)
        vars(other).update(vars(self))
        other.cache = cache
        other.keys, other.values = (rows_of(own, rows).clone() for own in (self.keys, self.values))
        return other

    def _whole(self, rows: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
        """Keys and values of some rows, with those of their prompts in front."""
        for name, own, at in (("keys", self.keys, 0), ("values", self.values, 1)):
            own = rows_of(own, rows)
            if self.prompts is not None:
                assert self.cache.sources is not None
                own = torch.cat([self.prompts[at][[self.cache.sources[row] for row in rows]], own], dim=2)
            yield name, own

    def plain(self, rows: Sequence[int] | None, places: Tensor | None, width: int) -> DynamicLayer:
        """A layer of transformers' own with some rows (all by default) and columns (R, W), by default the first W."""
        layer: Any = DynamicLayer() if self.window is None else DynamicSlidingWindowLayer(self.window)
        layer.lazy_initialization(self.keys, self.values)
        skip = 0 if self.window is None else max(0, width - self.window + 1)
        rows = range(len(self.keys)) if rows is None else rows
        for name, own in self._whole(rows):
            first = self.first if self.prompts is None else 0
            if places is None:
                own = own[:, :, max(skip - first, 0) : width - first]
            else:
                columns = (places[:, max(skip, first) :] - first).clamp(min=0).to(self.device)
                index = torch.arange(len(own), device=self.device)[:, None]
                own = own.transpose(1, 2)[index, columns].transpose(1, 2)
            setattr(layer, name, own)
        if self.window is not None:
            layer.cumulative_length = width
        return layer  # type: ignore[no-any-return]


def _of_rows(layer: Any, cache: RoomCache, rows: Sequence[int]) -> Any:
    if isinstance(layer, _RoomLayer):
        return layer.select(cache, rows)
    return kv.StateLayer.of(layer, rows) if kv.stateful(layer) else layer


def _plain(layer: Any, rows: Sequence[int] | None, places: Tensor | None, width: int) -> Any:
    if isinstance(layer, _RoomLayer):
        return layer.plain(rows, places, width)
    return kv.StateLayer.of(layer, rows) if kv.stateful(layer) else layer


def rows_of(states: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows; where they stand side by side, nothing is copied."""
    first = rows[0]
    if list(rows) == list(range(first, first + len(rows))):
        return states[first : first + len(rows)]
    return states.index_select(0, torch.as_tensor(rows, device=states.device))


def _blocks(columns: int, size: int = 0) -> int:
    """So many columns, filled up to whole blocks."""
    size = size or BLOCK
    return -(-columns // size) * size


def _roomy(own: Tensor, size: int, dim: int) -> Tensor:
    """The same in room of ``size`` along a dimension."""
    shape = list(own.shape)
    shape[dim] = size
    larger = own.new_zeros(shape)
    larger.narrow(dim, 0, own.shape[dim]).copy_(own)
    return larger
