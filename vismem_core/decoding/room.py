"""The KV cache of a batch whose rows grow apart.

Room is reserved ahead, in blocks, and every row writes at its own place: one that takes in N latents goes on by N
columns, its neighbours by one. Nothing is shifted, concatenated or copied while tokens are written; what a row may look
at is a mask over the columns (B, W), since those behind a row's end hold nothing and those in front may be padding.
So another prompt may begin at the front of a row that is done.

Until rows have grown apart the cache looks to the model like transformers' own, and attention gives the same bits.
Afterwards models that go by where columns stand (:data:`vismem_core.base.cache.COUNTED`) are shown copies of the rows,
aligned to the right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from vismem_core.base import cache as kv

from .columns import RoomLayer, in_room, of_rows, plain, roomy

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
        left: what an earlier cache has left (:attr:`tensors`), to be written to where it fits.
        shared: rows of one prompt, which stand together, hold its columns once. Only a packed pass can read them then.

    Attributes:
        used: columns that some row has written, W.
        ends: (B,), the next column of each row.
        ragged: whether rows end in different columns.
        whole: whether every layer holds all tokens: none has a sliding window, or a state.
        sources: each row's row of the prompts' columns, where these are shared, or None.
        still: whether passes look at all the room, written or not, so that their shapes stay as they are.
        counted: whether the model goes by where columns stand.
        passes: how many there were.
    """

    layers: list[Any]
    used: int
    ragged: bool
    _lengths: list[int]

    def __init__(
        self,
        cache: DynamicCache,
        mask: Tensor,
        rows: Sequence[int] | None = None,
        ahead: int = 0,
        shared: bool = False,
        left: Sequence[Tensor] = (),
    ) -> None:
        super().__init__()
        rows = list(range(len(mask))) if rows is None else rows
        self._end([mask.shape[1]] * len(rows))
        self.whole = kv.whole(cache)
        self.still, self.sources = False, list(rows) if shared else None
        self.counted, self.passes = kv.counted(cache), 0
        room = _blocks(self.used + ahead, STEP) if ahead else _blocks(self.used + BLOCK)
        self._seen = roomy(mask.bool()[torch.as_tensor(rows, device=mask.device)], room, dim=1)
        self.ends = torch.full((len(rows),), self.used, device=mask.device)
        self._coming, self._reach = 0, self.used
        self._columns: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self.left = list(left)
        self.layers = [in_room(self, layer, rows, room) for layer in cache.layers]
        self.left = []

    @property
    def grown(self) -> list[RoomLayer]:
        """The layers with room for tokens."""
        return [layer for layer in self.layers if isinstance(layer, RoomLayer)]

    @property
    def tensors(self) -> list[Tensor]:
        """What is reserved, layer after layer."""
        return [own for layer in self.grown for own in (layer.keys, layer.values)]

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

    @property
    def aligned(self) -> bool:
        """Whether the model is shown rows aligned to the right."""
        return self.counted and self.ragged

    @property
    def shown(self) -> Tensor:
        """What rows may look at of what the model is shown, (B, W)."""
        return self._aligned(self._seen, self.last(self.used)) if self.aligned else self.mask

    def last(self, count: int) -> Tensor:
        """The last so many columns of every row, (B, count), negative where it has fewer."""
        return self.ends[:, None] + torch.arange(-count, 0, device=self.ends.device)

    def seen(self, window: int | None, chunked: bool = False, width: int = 1) -> Tensor:
        """What the last tokens of the rows may look at, (B, T, K), in layers with a window or none.

        A window counts from the rows' own places, and chunks of that length from the first that a row may see.

        Args:
            width: T. Of more than one, those count that the coming pass writes; what stands behind a row's end there
                (riders, or nothing) sees the row and what is behind its end before it.
        """
        first = max(layer.first for layer in self.grown if layer.window == window)
        stop = self._seen.shape[1] if self.still else self.used
        seen = self._seen[:, None, first:stop]
        if width == 1 and window is None:
            return seen
        places, last = torch.arange(first, stop, device=self.ends.device), self.ends[:, None] - 1
        if width > 1:
            last = self._starts[:, None] + torch.arange(width, device=last.device)
            seen = (seen | (places >= self.ends[:, None, None])) & (places <= last[..., None])
        if window is None:
            return seen
        begin = last - (last - self._seen.int().argmax(1)[:, None]) % window if chunked else last + 1 - window
        return seen & (places >= begin[..., None])

    def aim(self, counts: int | Sequence[int], beyond: Sequence[int] = (), width: int = 0) -> None:
        """The coming pass writes so many tokens to every row, and so many ``beyond`` that are gone after it.

        Args:
            width: the pass is of so many tokens in every row, and those beyond its count are gone after it.
        """
        rows = len(self._lengths)
        same = isinstance(counts, int) and not self.ragged
        counts = [counts] * rows if isinstance(counts, int) else list(counts)
        beyond = [width - count for count in counts] if width else beyond
        starts = self.ends
        self._starts, self._same, self._columns = starts, same, {}
        self._coming, self.passes = width or max(counts), self.passes + 1
        before = self.used
        self._end([own + count for own, count in zip(self._lengths, counts, strict=True)])
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
        room = _blocks(most + BLOCK)
        for layer in self.grown:
            layer.reorder(order, room)
        self.ends = lengths
        self._end(lengths.tolist())
        self._seen = roomy(torch.arange(most, device=lengths.device) < lengths[:, None], room, dim=1)
        return True

    def select(self, rows: Sequence[int]) -> RoomCache:
        """The given rows alone, copied."""
        other: RoomCache = RoomCache.__new__(RoomCache)
        vars(other).update(vars(self))
        index = torch.as_tensor(rows, device=self.ends.device)
        other._end([self._lengths[row] for row in rows])
        other.ends, other._seen = self.ends[index], self._seen[index]
        other._columns = {}
        other.sources = None if self.sources is None else [self.sources[row] for row in rows]
        other.layers = [of_rows(layer, other, rows) for layer in self.layers]
        return other

    def together(self, rows: Sequence[int]) -> tuple[DynamicCache, Tensor]:
        """Some rows as transformers keep them, padded on the left, and their mask; appending leaves this one alone."""
        index = torch.as_tensor(rows, device=self.ends.device)
        everyone = list(rows) == list(range(len(self._lengths)))
        width = max(self._lengths[row] for row in rows)
        result = DynamicCache()
        if all(self._lengths[row] == width for row in rows):
            result.layers = [plain(layer, None if everyone else rows, None, width) for layer in self.layers]
            seen = self._seen[:, :width]
            return result, (seen if everyone else seen[index]).long()
        places = self.last(width)[index]
        result.layers = [plain(layer, rows, places, width) for layer in self.layers]
        return result, self._aligned(self._seen[index], places).long()

    @staticmethod
    def _aligned(seen: Tensor, places: Tensor) -> Tensor:
        return seen.gather(1, places.clamp(min=0)) & (places >= 0)

    def put(self, cache: DynamicCache, rows: Sequence[int], count: int) -> None:
        """Write the last ``count`` tokens of ``rows``, which were continued elsewhere; :meth:`aim` says where."""
        index = torch.as_tensor(rows, device=self.ends.device)
        self._put(cache, index, self._starts[index][:, None] + torch.arange(count, device=index.device))

    def _put(self, cache: DynamicCache, rows: Tensor, columns: Tensor) -> None:
        """Write the last T tokens of another cache's rows at rows (R,) and columns (R, T)."""
        count = columns.shape[1]
        for layer, other in zip(self.grown, kv.layers(cache), strict=True):
            layer.put(rows[:, None], columns, {name: own[:, :, -count:] for name, own in kv.held(other).items()})
        for layer, other in zip(kv.states(self), kv.states(cache), strict=True):
            layer.take_over(other, rows)

    def seat(self, rows: Sequence[int], cache: DynamicCache, mask: Tensor) -> None:
        """Rows begin anew with what another cache holds, and forget what they held.

        Args:
            mask: (R, W) over ``cache``.
        """
        index, width = torch.as_tensor(rows, device=self.ends.device), mask.shape[1]
        self.ends = self.ends.index_fill(0, index, width)
        self._end(self.ends.tolist())
        self.landed()
        self._reserve()
        self._seen[index] = roomy(mask.bool(), self._seen.shape[1], dim=1)
        for layer, other in zip(self.grown, kv.layers(cache), strict=True):
            layer.begin(width - next(iter(kv.held(other).values())).shape[2])
        self._put(cache, index, torch.arange(width, device=index.device).expand(len(rows), -1))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns in front of the coming pass."""
        return self.used - self._coming

    def _end(self, lengths: list[int]) -> None:
        """Rows end in these columns."""
        self._lengths, self.used = lengths, max(lengths)
        self.ragged = min(lengths) != self.used

    def _reserve(self) -> None:
        if self._reach > self._seen.shape[1]:
            room = _blocks(self._reach + BLOCK)
            self._seen = roomy(self._seen, room, dim=1)
            for layer in self.grown:
                layer.reserve(room)


def _blocks(columns: int, size: int = 0) -> int:
    """So many columns, filled up to whole blocks."""
    size = size or BLOCK
    return -(-columns // size) * size
