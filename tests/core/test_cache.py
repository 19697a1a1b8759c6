"""Row surgery on a KV cache, against one row at a time."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from vismem_core.base import cache as kv
from vismem_core.errors import AttachError

WINDOW = 6


def filled(width: int, batch: int = 3, seed: int = 0, split: int = 1) -> DynamicCache:
    """A full layer and a sliding one, with ``width`` tokens that came in ``split`` pieces."""
    cache = DynamicCache()
    cache.layers = [DynamicLayer(), DynamicSlidingWindowLayer(WINDOW)]
    torch.manual_seed(seed)
    for layer in cache.layers:
        for piece in torch.randn(2, batch, 2, width, 4).tensor_split(split, dim=-2):
            layer.update(*piece)
    return cache


def content(cache: Any) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]


def same(left: Any, right: Any) -> bool:
    return all(a.equal(b) for one, two in zip(left, right, strict=True) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("rows", [[0], [2, 0], [1, 1], [0, 1, 2]])
def test_select_and_fork_leave_the_cache_alone(rows: list[int]) -> None:
    cache = filled(4)
    before = content(cache)
    branch = kv.select(cache, rows)
    assert same(content(branch), [(keys[rows], values[rows]) for keys, values in before])
    for layer in branch.layers:
        layer.update(*torch.randn(2, len(rows), 2, 3, 4))
    assert branch.get_seq_length() == 7
    assert branch.layers[1].get_seq_length() == 7
    assert same(content(cache), before)
    assert [layer.get_seq_length() for layer in cache.layers] == [4, 4]


SIZES = [
    (width, length, room)
    for width, length in product([2, 4, WINDOW - 1, WINDOW, 11], [1, 3, 9])
    for room in sorted({0, length // 2, length})
    if room <= width
]
"""Tokens in the cache, tokens that come, and how many of them find room in their row's padding."""


@pytest.mark.parametrize(("width", "length", "room"), SIZES)
@pytest.mark.parametrize("rows", [[1], [2, 0]])
def test_graft_is_left_padding(width: int, length: int, room: int, rows: list[int]) -> None:
    """Afterwards every row's right end is what that row alone would hold, and masks and sizes agree."""
    free = length - room
    mask = torch.ones(3, width, dtype=torch.long)
    mask[rows, :room] = 0
    cache, fresh = filled(width), torch.randn(2, len(rows), 2, length, 4)
    alone = [kv.select(filled(width), [row]) for row in range(3)]
    grown = kv.select(cache, rows)
    for at, row in enumerate(rows):
        for layer in alone[row].layers:
            layer.update(*fresh[:, at : at + 1])
    for layer in grown.layers:
        layer.update(*fresh)
    kv.graft(cache, grown, rows, free)
    new_mask = kv.graft_mask(mask, rows, length, free)

    assert new_mask.shape == (3, width + free)
    assert cache.get_seq_length() == cache.layers[1].get_seq_length() == width + free
    assert cache.layers[0].keys.shape[-2] == width + free
    assert cache.layers[1].keys.shape[-2] == min(width + free, WINDOW - 1)
    for row in range(3):
        real = width - (room if row in rows else 0) + (length if row in rows else 0)
        assert new_mask[row].tolist() == [0] * (width + free - real) + [1] * real
        for layer, reference in zip(cache.layers, alone[row].layers, strict=True):
            count = min(real, layer.keys.shape[-2])
            assert layer.keys[row, :, -count:].equal(reference.keys[0, :, -count:])
            assert layer.values[row, :, -count:].equal(reference.values[0, :, -count:])


def test_sliding_windows_go_on_as_if_alone() -> None:
    """A row that took in tokens and its neighbour see the next token's window as each would alone."""
    cache, fresh, step = filled(4, batch=2), torch.randn(2, 1, 2, 3, 4), torch.randn(2, 2, 2, 1, 4)
    alone = [kv.select(filled(4, batch=2), [row]).layers[1] for row in range(2)]
    alone[1].update(*fresh)
    grown = kv.select(cache, [1])
    for layer in grown.layers:
        layer.update(*fresh)
    kv.graft(cache, grown, [1], 3)
    sliding = cache.layers[1]
    length, offset = sliding.get_mask_sizes(1)
    keys, _ = sliding.update(*step)
    assert keys.shape[-2] == length
    for row, own in enumerate(alone):
        expected, _ = own.update(*step[:, row : row + 1])
        count = min(expected.shape[-2], WINDOW)
        assert keys[row, :, -count:].equal(expected[0, :, -count:])
    assert offset + length == 8


def test_compacted_rows_are_padded_on_the_left_again() -> None:
    """Masked columns leave from wherever they are; what a row has of them beyond its neighbours becomes padding."""
    cache = filled(5)
    cache.layers = cache.layers[:1]
    keys, values = content(cache)[0]
    mask = torch.tensor([[1, 0, 0, 1, 1], [0, 1, 1, 1, 1], [0, 0, 1, 0, 1]])
    assert kv.whole(cache) and not kv.whole(filled(5))
    assert kv.compact(cache, mask, 1).tolist() == [[0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1]]
    for own, before in ((cache.layers[0].keys, keys), (cache.layers[0].values, values)):
        assert own.shape[-2] == cache.get_seq_length() == 4
        for row, kept in enumerate(([0, 3, 4], [1, 2, 3, 4], [2, 4])):
            assert own[row, :, -len(kept) :].equal(before[row, :, kept])


class Odd(DynamicLayer):  # type: ignore[misc]
    """Stands for layers that hold more than keys and values, such as quantised ones."""


@pytest.mark.parametrize("kind", ["tuple", "static", "odd", "offloaded"])
def test_caches_that_cannot_grow_by_rows(kind: str) -> None:
    cache: Any = filled(2)
    if kind == "tuple":
        cache = ((torch.zeros(1), torch.zeros(1)),)
    elif kind == "static":
        from bases import tied

        cache = StaticCache(config=tied().model.config.text_config, max_cache_len=8)
    elif kind == "odd":
        cache.layers[1] = Odd()
    else:
        cache.offloading = True
    with pytest.raises(AttachError, match=r"memory (needs a dynamic KV cache|cannot grow)"):
        kv.check(cache)


def test_dynamic_caches_pass() -> None:
    cache = filled(2)
    assert kv.check(cache) is cache
