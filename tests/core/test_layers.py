"""Layers that hold more than keys and values, or a state too: rows of one cache, against each row alone without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_types import OWN, build
from torch import Tensor

from vismem_core.base import cache as kv
from vismem_core.decoding.room import RoomCache
from vismem_core.testing.liveliness import close

LENGTHS = (14, 23)
"""Of prompts; both are longer than windows are wide and indexers choose tokens."""
PLAIN = {"text_config.ple_layer_ids": []}
SHARED = {"text_config.num_hidden_layers": 5, "text_config.kv_source_layers": [0, 0, 2, 3, 0],
          "text_config.no_rope_layers": [1, 1, 1, 0, 1], "text_config.layer_types": ["indexed_attention"] * 5,
          "text_config.indexer_types": ["full"] * 3 + ["shared", "full"],
          "text_config.mlp_layer_types": ["dense"] * 5}  # fmt: skip
MODELS = {
    "indexed": ("mistral_large4", {}),
    "indexed, and some read another's keys": ("mistral_large4", SHARED),
    "indexed by pools, states": ("glm5_next", {}),
    "indexed, with places, states": ("qwen4_exp", PLAIN),
    "indexed, windows": ("dots3_note", {}),
    "state and keys": ("inkling2", {}),
    "passed twice": ("inkling2_loop", {}),
}


class Row:
    """One row's vectors, and what a model without a cache makes of them."""

    def __init__(self, decoder: Any, prompt: Tensor) -> None:
        self.decoder, self.embeds = decoder, prompt

    def add(self, vectors: Tensor) -> Tensor:
        """Their positions (1, T)."""
        start = self.embeds.shape[1]
        self.embeds = torch.cat([self.embeds, vectors], dim=1)
        return torch.arange(start, start + vectors.shape[1])[None]

    def last(self, count: int) -> Tensor:
        output = self.decoder(inputs_embeds=self.embeds, use_cache=False)
        return output.last_hidden_state[:, -count:]  # type: ignore[no-any-return]


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def decoder(request: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    model_type, settings = request.param
    monkeypatch.setitem(OWN, model_type, OWN[model_type] | settings)
    return build(model_type)[0].get_decoder()


def read(decoder: Any) -> tuple[list[Row], Any, Tensor]:
    """Two prompts in one batch, padded on the left: the rows, their cache and its mask."""
    table = decoder.get_input_embeddings()
    rows = [Row(decoder, table(torch.randint(8, 40, (1, length)))) for length in LENGTHS]
    pads = [max(LENGTHS) - length for length in LENGTHS]
    embeds = torch.cat(
        [torch.nn.functional.pad(row.embeds, (0, 0, pad, 0)) for row, pad in zip(rows, pads, strict=True)]
    )
    mask = torch.tensor([[0] * pad + [1] * length for pad, length in zip(pads, LENGTHS, strict=True)])
    output = decoder(inputs_embeds=embeds, attention_mask=mask, position_ids=places(mask), use_cache=True)
    for at, row in enumerate(rows):
        close(output.last_hidden_state[at : at + 1, -1:], row.last(1))
    return rows, kv.check(getattr(output, kv.NAME), decoder.config), mask


def places(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def vectors(decoder: Any, rows: int, count: int) -> Tensor:
    table = decoder.get_input_embeddings().weight
    return table.std() * torch.randn(rows, count, table.shape[1])


def step(decoder: Any, rows: list[Row], cache: RoomCache) -> None:
    """Every row takes in one vector."""
    fresh = vectors(decoder, len(rows), 1)
    positions = torch.cat([row.add(fresh[at : at + 1]) for at, row in enumerate(rows)])
    cache.aim(1)
    output = decoder(
        inputs_embeds=fresh,
        attention_mask=cache.shown.long(),
        position_ids=positions,
        use_cache=True,
        **kv.given(decoder, cache),
    )
    cache.landed()
    for at, row in enumerate(rows):
        close(output.last_hidden_state[at : at + 1], row.last(1), f"row {at} is another than alone")


def apart(decoder: Any, rows: list[Row], cache: RoomCache, which: int, count: int) -> None:
    """One row takes in some vectors while the others wait."""
    fresh = vectors(decoder, 1, count)
    positions = rows[which].add(fresh)
    grown, mask = cache.together([which])
    mask = torch.cat([mask, mask.new_ones(1, count)], dim=-1)
    output = decoder(
        inputs_embeds=fresh, attention_mask=mask, position_ids=positions, use_cache=True, **kv.given(decoder, grown)
    )
    close(output.last_hidden_state, rows[which].last(count))
    cache.aim([count * (row == which) for row in range(len(rows))])
    cache.put(grown, [which], count)
    cache.landed()


@torch.no_grad()
def test_rows_that_grow_apart_are_what_they_are_alone(decoder: Any) -> None:
    torch.manual_seed(0)
    rows, prompts, mask = read(decoder)
    cache = RoomCache(prompts, mask)
    step(decoder, rows, cache)
    for which, count in ((1, 3), (0, 2), (0, 4)):
        apart(decoder, rows, cache, which, count)
        step(decoder, rows, cache)
        step(decoder, rows, cache)
    assert cache.ragged and cache.aligned
    part, alone = cache.select([1]), Row(decoder, rows[1].embeds)
    step(decoder, [alone], part)
    step(decoder, rows, cache)  # the others are as they were
    several = RoomCache(prompts, mask, [1, 0, 1])
    copies = [Row(decoder, rows[at].embeds[:, : LENGTHS[at]]) for at in (1, 0, 1)]
    apart(decoder, copies, several, 2, 3)
    step(decoder, copies, several)


@torch.no_grad()
def test_a_cache_as_it_once_was(decoder: Any) -> None:
    torch.manual_seed(0)
    rows, prompts, mask = read(decoder)
    grown, then = kv.fork(prompts), {}
    for count in (3, 1, 4):
        fresh = vectors(decoder, 2, count)
        positions = torch.cat([row.add(fresh[at : at + 1]) for at, row in enumerate(rows)])
        mask = torch.cat([mask, mask.new_ones(2, count)], dim=-1)
        decoder(
            inputs_embeds=fresh, attention_mask=mask, position_ids=positions, use_cache=True, **kv.given(decoder, grown)
        )
        then[mask.shape[1]] = kv.forgetful(grown)
    which, stops = [1, 0, 1], [max(LENGTHS) + 3, max(LENGTHS) + 4, max(LENGTHS) + 8]
    once, seen = kv.upto(grown, mask[which], which, stops, then)
    pasts = [
        Row(decoder, rows[at].embeds[:, : LENGTHS[at] + stop - max(LENGTHS)])
        for at, stop in zip(which, stops, strict=True)
    ]
    fresh = vectors(decoder, 3, 2)
    positions = torch.cat([row.add(fresh[at : at + 1]) for at, row in enumerate(pasts)])
    seen = torch.cat([seen, seen.new_ones(3, 2)], dim=-1)
    output = decoder(
        inputs_embeds=fresh, attention_mask=seen, position_ids=positions, use_cache=True, **kv.given(decoder, once)
    )
    for at, row in enumerate(pasts):
        close(output.last_hidden_state[at : at + 1], row.last(2), f"row {at} is another than it was")
