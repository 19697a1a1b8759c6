"""What one layer of a cache holds of each token, with room for more: keys, values, and what an indexer reads."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, Protocol
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicIndexedLayer, DynamicLayer, DynamicSlidingWindowLayer

from vismem_core.base import cache as kv


class Rows(Protocol):
    """What layers look up in their cache (:class:`vismem_core.decoding.room.RoomCache`): which rows stand where."""

    used: int
    ends: Tensor
    ragged: bool
    counted: bool
    still: bool
    passes: int
    left: list[Tensor]
    sources: list[int] | None
    _same: bool
    _coming: int
    _reach: int

    @property
    def aligned(self) -> bool: ...

    def columns(self, device: torch.device) -> tuple[Tensor, Tensor]: ...

    def last(self, count: int) -> Tensor: ...

    def get_seq_length(self) -> int: ...


class RoomLayer(DynamicLayer):
    """Keys and values (B, heads, room, w) of one layer.

    Attributes:
        first: the column that the first one is; more than 0 where a sliding window had passed others by, or these are
            the prompts'.
        prompts: keys and values (P, heads, first, w) of the prompts, where rows share them.
        beside: what else there is of each token, in the same form.
    """

    keys: Tensor
    values: Tensor
    prompts: tuple[Tensor, ...] | None

    def __init__(self, cache: Rows, layer: Any, rows: Sequence[int], room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cache, self.is_initialized = cache, True  # the setter below
        self._staying: Tensor | None = None
        self.window = int(layer.sliding_window) if isinstance(layer, DynamicSlidingWindowLayer) else None
        self.is_sliding = self.window is not None
        self.beside: dict[str, Tensor] = {}
        held = kv.held(layer)
        self._like = copy.copy(layer)
        for name in held:
            setattr(self._like, name, None)
        own = next(iter(held.values()))
        self.device, self.first, self.prompts = own.device, cache.used - own.shape[-2], None
        if cache.sources is not None:
            self.prompts, self.first = tuple(held.values()), cache.used
            held = {name: own[:, :, :0] for name, own in held.items()}
        room -= self.first
        self._hold({name: roomy(rows_of(own, rows), room, dim=2, left=cache.left) for name, own in held.items()})

    @property
    def cache(self) -> Rows:
        """The cache that it belongs to, which holds it. The way back holds nothing: in a circle, what a call has cached
        would stay until the garbage collector comes by."""
        found = self._cache()
        assert found is not None
        return found

    @cache.setter
    def cache(self, cache: Rows) -> None:
        self._cache = ref(cache)

    def _held(self) -> dict[str, Tensor]:
        plain = {"keys": self.keys, "values": self.values}
        return {name: own for name, own in (plain | self.beside).items() if own is not None}

    def _hold(self, tokens: dict[str, Tensor]) -> None:
        beside: dict[str, Any] = dict(tokens)
        self.keys, self.values = beside.pop("keys", None), beside.pop("values", None)
        self.beside = beside

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.cache.still:
            self.write(*self.cache.columns(self.device), key_states, value_states)
            return self.keys, self.values
        self._store(self.keys, key_states)
        self._store(self.values, value_states)
        return self.view()

    def _store(self, own: Tensor, new: Tensor) -> None:
        """Write what the coming pass has made of every row."""
        cache = self.cache
        if cache._same:
            stop = cache.used - self.first
            own[:, :, stop - cache._coming : stop] = new
        else:
            self._write(own, *cache.columns(own.device), new)

    def view(self) -> tuple[Tensor, Tensor]:
        """The keys and values that the coming pass may look at."""
        return self._view("keys", self.keys), self._view("values", self.values)

    def _view(self, name: str, own: Tensor) -> Tensor:
        length, offset = self.get_mask_sizes(self.cache._coming)
        if self.cache.aligned:
            rows = torch.arange(len(own), device=own.device)[:, None]
            return kv.taken(name, own, rows, self.cache.last(length) - self.first)
        return own[:, :, offset - self.first : offset - self.first + length]

    def write(self, rows: Tensor, columns: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write keys and values (R, heads, T, w) at rows (R, 1) and columns (R, T)."""
        self.put(rows, columns, {"keys": keys, "values": values})

    def put(self, rows: Tensor, columns: Tensor, tokens: dict[str, Tensor]) -> None:
        """Write whatever there is of tokens.

        A window may hold fewer than the columns (R, T): what it has passed is not seen again.
        """
        held = self._held()
        for name, new in tokens.items():
            self._write(held[name], rows, columns[:, -new.shape[2] :], new)

    def begin(self, first: int) -> None:
        """Hold columns from ``first`` on, if they began later."""
        if (more := self.first - first) > 0:
            self._hold({name: F.pad(own, (0, 0, more, 0)) for name, own in self._held().items()})
            self.first = first

    def _write(self, own: Tensor, rows: Tensor, columns: Tensor, new: Tensor) -> None:
        own.transpose(1, 2)[rows.to(own.device), columns.to(own.device) - self.first] = new.transpose(1, 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        cache = self.cache
        used = cache._reach if cache._coming else cache.used + query_length
        if self.window is None or (cache.ragged and not cache.counted) or cache._reach > cache.used:
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
        self._hold({name: roomy(own, columns - self.first, dim=2) for name, own in self._held().items()})

    def reorder(self, order: Tensor, room: int) -> None:
        """Keep other columns (B, W) in that order, in so much room."""
        rows = torch.arange(len(order), device=order.device)[:, None]
        kept = {name: kv.taken(name, own, rows, order) for name, own in self._held().items()}
        self._hold({name: roomy(own, room, dim=2) for name, own in kept.items()})

    def select(self, cache: Rows, rows: Sequence[int]) -> RoomLayer:
        """The given rows alone, for another cache."""
        other = copy.copy(self)
        other.cache = cache
        index = torch.as_tensor(rows, device=self.device)
        other._hold({name: own.index_select(0, index) for name, own in self._held().items()})
        return other

    def _whole(self, rows: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
        """What there is of some rows, with that of their prompts in front."""
        for at, (name, own) in enumerate(self._held().items()):
            own = rows_of(own, rows)
            if self.prompts is not None:
                assert self.cache.sources is not None
                own = torch.cat([self.prompts[at][[self.cache.sources[row] for row in rows]], own], dim=2)
            yield name, own

    def plain(self, rows: Sequence[int] | None, places: Tensor | None, width: int) -> DynamicLayer:
        """A layer of transformers' own with some rows (all by default) and columns (R, W), by default the first W."""
        layer: Any = kv.forked(self._like)
        skip = 0 if self.window is None else max(0, width - self.window + 1)
        rows = range(len(self.cache.ends)) if rows is None else rows
        first = self.first if self.prompts is None else 0
        told: dict[str, Tensor] = {}
        for name, own in self._whole(rows):
            if places is None:
                told[name] = own[:, :, max(skip - first, 0) : width - first]
            else:
                index = torch.arange(len(own), device=own.device)[:, None]
                told[name] = kv.taken(name, own, index, places[:, max(skip, first) :] - first)
        kv.hold(layer, told)
        if self.window is not None:
            layer.cumulative_length = width
        return layer  # type: ignore[no-any-return]


class IndexedRoomLayer(RoomLayer):
    """With what an indexer reads of each token."""

    _passes = -1  # how many the cache had seen when this layer was written last

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._passes = self.cache.passes
        return super().update(*args, **kwargs)

    def get_seq_length(self) -> int:
        return self.cache.used if self._passes == self.cache.passes else super().get_seq_length()

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        self._note("indexer_keys", indexer_key_states)
        return self._told("indexer_keys")

    @property
    def indexer_position_ids(self) -> Tensor | None:
        """Positions (w, B, W) of the tokens in front of the coming pass, which models set to these and its own."""
        if "indexer_position_ids" not in self.beside:
            return None
        told = self._told("indexer_position_ids")
        return told[..., : told.shape[-1] - self.cache._coming]

    @indexer_position_ids.setter
    def indexer_position_ids(self, told: Tensor) -> None:
        self._note("indexer_position_ids", told[..., -self.cache._coming :])

    def _note(self, name: str, told: Tensor) -> None:
        self._store(self.beside[name], kv.COLUMNS[name][0](told))

    def _told(self, name: str) -> Tensor:
        return kv.COLUMNS[name][1](self._view(name, self.beside[name]))


class StateRoomLayer(RoomLayer, kv.StateLayer):  # type: ignore[misc]
    """With a state for each row."""

    def __init__(self, cache: Rows, layer: Any, rows: Sequence[int], room: int) -> None:
        vars(self).update(vars(layer))
        super().__init__(cache, layer, rows, room)
        self.follow(layer, rows)

    def select(self, cache: Rows, rows: Sequence[int]) -> RoomLayer:
        other: Any = super().select(cache, rows)
        other.follow(self, rows)
        return other  # type: ignore[no-any-return]

    def plain(self, rows: Sequence[int] | None, places: Tensor | None, width: int) -> DynamicLayer:
        layer: Any = super().plain(rows, places, width)
        layer.follow(self, rows)
        return layer  # type: ignore[no-any-return]


def in_room(cache: Rows, layer: Any, rows: Sequence[int], room: int) -> Any:
    """A layer of a prompt's cache, for the rows of one with room."""
    if not isinstance(layer, DynamicLayer):
        return kv.forked(layer, rows)
    if kv.stateful(layer):
        return StateRoomLayer(cache, layer, rows, room)
    return (IndexedRoomLayer if isinstance(layer, DynamicIndexedLayer) else RoomLayer)(cache, layer, rows, room)


def of_rows(layer: Any, cache: Rows, rows: Sequence[int]) -> Any:
    """A layer of a cache with room, with the given rows alone."""
    return layer.select(cache, rows) if isinstance(layer, RoomLayer) else kv.forked(layer, rows)


def plain(layer: Any, rows: Sequence[int] | None, places: Tensor | None, width: int) -> Any:
    """A layer of a cache with room as transformers keep it, see :meth:`RoomLayer.plain`."""
    return layer.plain(rows, places, width) if isinstance(layer, RoomLayer) else kv.forked(layer, rows)


def rows_of(states: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows; where they stand side by side, nothing is copied."""
    first = rows[0]
    if list(rows) == list(range(first, first + len(rows))):
        return states[first : first + len(rows)]
    return states.index_select(0, torch.as_tensor(rows, device=states.device))


def roomy(own: Tensor, size: int, dim: int, left: list[Tensor] | None = None) -> Tensor:
    """The same in room of ``size`` along a dimension: in the first that is ``left``, if that is just such room."""
    shape = list(own.shape)
    shape[dim] = size
    if left and (list(left[0].shape), left[0].dtype, left[0].device) == (shape, own.dtype, own.device):
        larger = left.pop(0).zero_()
    else:
        if left:
            left.clear()  # it is given back before more is asked for
        larger = own.new_zeros(shape)
    larger.narrow(dim, 0, own.shape[dim]).copy_(own)
    return larger
