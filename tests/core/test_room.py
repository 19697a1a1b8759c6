"""Rows that grow apart in one cache, against one row at a time in transformers' own."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
from caches import WINDOW, content, filled, same
from torch import Tensor

from vismem_core.base import cache as kv
from vismem_core.decoding import room
from vismem_core.decoding.room import RoomCache


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "BLOCK", 3)


def feed(cache: RoomCache, counts: list[int], seed: int) -> Tensor:
    """A pass that writes so many random tokens to every row, as the model would or as packing does."""
    torch.manual_seed(seed)
    fresh = torch.randn(2, len(counts), 2, max(counts), 4)
    same_for_all = len(set(counts)) == 1
    cache.aim(counts[0] if same_for_all else counts)
    for layer in cache.layers:
        if same_for_all:
            layer.update(*fresh)
        else:
            for row, count in enumerate(counts):
                columns = cache.starts()[row] + torch.arange(count)
                layer.write(torch.tensor([[row]]), columns[None], *(own[row : row + 1, :, :count] for own in fresh))
    cache.landed()
    return fresh


def grown_alone(row: int, width: int, fed: list[tuple[list[int], Tensor]]) -> Any:
    cache = kv.select(filled(width), [row])
    for counts, fresh in fed:
        if counts[row]:
            for layer in cache.layers:
                layer.update(*(own[row : row + 1, :, : counts[row]] for own in fresh))
    return cache


@pytest.mark.parametrize("width", [2, WINDOW - 1, WINDOW, 11])
@pytest.mark.parametrize("seed", range(4))
def test_every_row_holds_what_it_holds_alone(width: int, seed: int) -> None:
    chance = Random(seed)
    before = filled(width)
    cache = RoomCache(before, torch.ones(3, width, dtype=torch.long))
    fed = []
    for step in range(9):
        counts = [1, 1, 1] if step % 2 else [chance.choice([0, 1, 4]) for _ in range(3)]
        fed.append((counts, feed(cache, counts, step)))
    assert same(content(before), content(filled(width)))  # what it was made of
    total = [width + sum(counts[row] for counts, _ in fed) for row in range(3)]
    assert cache.used == cache.get_seq_length() == max(total)
    assert cache.mask.long().tolist() == [[1] * own + [0] * (max(total) - own) for own in total]
    for rows in ([0], [2, 1], [1, 1], [0, 1, 2]):
        together, mask = cache.together(rows)
        wide = max(total[row] for row in rows)
        assert mask.tolist() == [[0] * (wide - total[row]) + [1] * total[row] for row in rows]
        assert [layer.get_seq_length() for layer in together.layers] == [wide, wide]
        for at, row in enumerate(rows):
            alone = grown_alone(row, width, fed)
            for layer, own in zip(together.layers, alone.layers, strict=True):
                count = own.keys.shape[-2]
                assert layer.keys[at, :, -count:].equal(own.keys[0]) and layer.values[at, :, -count:].equal(
                    own.values[0]
                )
        for layer in together.layers:  # appending leaves the others alone
            layer.update(*torch.randn(2, len(rows), 2, 2, 4))
    again, _ = cache.together([0, 1, 2])
    assert again.layers[0].keys.shape[-2] == max(total)


@pytest.mark.parametrize("width", [2, WINDOW - 1, WINDOW, 11])
def test_until_rows_grow_apart_models_see_what_transformers_show_them(width: int) -> None:
    theirs, cache = filled(width), RoomCache(filled(width), torch.ones(3, width, dtype=torch.long))
    for step in range(8):
        tokens = 1 + step % 3
        sizes = [layer.get_mask_sizes(tokens) for layer in theirs.layers]
        fresh = torch.randn(2, 3, 2, tokens, 4)
        cache.aim(tokens)
        assert [layer.get_mask_sizes(tokens) for layer in cache.layers] == sizes
        assert cache.get_seq_length() == theirs.get_seq_length()
        for one, other in zip(cache.layers, theirs.layers, strict=True):
            assert all(map(torch.equal, one.update(*fresh), other.update(*fresh)))
        cache.landed()
    assert not cache.ragged and not cache.whole


def test_some_rows_alone() -> None:
    cache = RoomCache(filled(4), torch.ones(3, 4, dtype=torch.long))
    feed(cache, [1, 5, 2], 0)
    expected, _ = cache.together([2, 0])
    before, _ = cache.together([0, 1, 2])
    part = cache.select([2, 0])
    assert part.used == 6 and part.ragged
    assert same(content(part.together([0, 1])[0]), content(expected))
    feed(part, [4, 1], 1)
    assert same(content(cache.together([0, 1, 2])[0]), content(before))
    several = RoomCache(filled(4), torch.ones(3, 4, dtype=torch.long), [1, 1, 0])
    assert same(content(several.together([0, 2])[0]), content(kv.select(filled(4), [1, 0])))


def test_rows_that_share_their_prompts_hold_what_they_hold_apart() -> None:
    prompts, mask = filled(4), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1]])
    prompts.layers = prompts.layers[:1]
    rows = [0, 0, 2, 2, 2]
    shared, apart = (RoomCache(prompts, mask, rows, shared=own) for own in (True, False))
    assert shared.layers[0].prompts is not None and shared.layers[0].prompts[0] is prompts.layers[0].keys
    for step, counts in enumerate(([1, 4, 1, 0, 2], [1, 1, 1, 1, 1], [5, 0, 1, 2, 1])):
        for cache in (shared, apart):
            feed(cache, counts, step)
        assert shared.mask.equal(apart.mask)
        for own in ([0], [3, 1], [0, 1, 2, 3, 4]):
            (one, seen), (other, expected) = shared.together(own), apart.together(own)
            assert same(content(one), content(other)) and seen.equal(expected)
    hidden = torch.zeros_like(shared.mask)
    hidden[:, 2] = True
    assert not shared.hide(hidden) and not shared.mask[:, 2].any()  # other rows may need them
    part = shared.select([1, 4])
    assert part.sources == [0, 2]
    assert same(content(part.together([0, 1])[0]), content(shared.together([1, 4])[0]))


def test_what_was_continued_elsewhere_is_put_back() -> None:
    cache = RoomCache(filled(4), torch.ones(3, 4, dtype=torch.long))
    feed(cache, [1, 3, 2], 0)
    other, _ = cache.together([2, 0])
    fresh = torch.randn(2, 2, 2, 3, 4)
    for layer in other.layers:
        layer.update(*fresh)
    cache.aim([3, 0, 3])
    cache.put(other, [2, 0], 3)
    cache.landed()
    got, mask = cache.together([2, 0])
    assert mask.tolist() == [[1] * 9, [0] + [1] * 8]
    for layer in got.layers:
        assert layer.keys[:, :, -3:].equal(fresh[0]) and layer.values[:, :, -3:].equal(fresh[1])


def test_columns_that_nobody_may_see_are_given_up() -> None:
    prompt = filled(5)
    prompt.layers = prompt.layers[:1]
    keys, _ = content(prompt)[0]
    cache = RoomCache(prompt, torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]))
    hidden = torch.zeros(3, 5, dtype=torch.bool)
    hidden[0, 2], hidden[2, 3] = True, True
    assert not cache.hide(hidden)  # the row in the middle has them all
    hidden[1, 1:3] = True
    assert cache.hide(hidden)
    assert cache.used == cache.get_seq_length() == 3 and cache.ragged
    assert cache.mask.tolist() == [[True] * 3, [True] * 3, [True, True, False]]
    for row, kept in enumerate(([1, 3, 4], [0, 3, 4], [2, 4])):
        assert cache.layers[0].keys[row, :, : len(kept)].equal(keys[row, :, kept])
    fresh = feed(cache, [1, 1, 1], 0)
    got, mask = cache.together([2])
    assert mask.tolist() == [[1, 1, 1]] and got.layers[0].keys[0, :, -1:].equal(fresh[0, 2])
    sliding = RoomCache(filled(5), torch.ones(3, 5, dtype=torch.long))
    assert not sliding.hide(torch.ones(3, 5, dtype=torch.bool).tril(-3))  # distances count there
    assert sliding.used == 5


def test_windows_count_from_a_rows_own_end() -> None:
    cache = RoomCache(filled(11), torch.ones(3, 11, dtype=torch.long))
    first = 11 - (WINDOW - 1)
    assert [layer.first for layer in cache.layers] == [0, first]
    feed(cache, [1, 5, 2], 0)
    cache.aim(1)
    assert cache.seen(None)[:, 0].equal(cache.mask)
    for row, end in enumerate([13, 17, 14]):
        expected = [end - WINDOW <= column < end for column in range(first, 17)]
        assert cache.seen(WINDOW)[row, 0].tolist() == expected
    cache.landed()


@pytest.mark.parametrize("ahead", [1, room.STEP, 3 * room.STEP + 1])
def test_where_it_is_known_what_comes_little_more_is_reserved(ahead: int) -> None:
    cache = RoomCache(filled(11), torch.ones(3, 11), ahead=ahead)
    (layer, *_) = [own for own in cache.grown if own.window is None]
    reserved = layer.keys.shape[2]
    assert 11 + ahead <= reserved < 11 + ahead + room.STEP and reserved % room.STEP == 0
