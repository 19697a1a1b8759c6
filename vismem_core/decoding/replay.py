"""Replay: answers with memory in them read again, in one pass and with gradients.

A pass without gradients over the answers, with the latents that are known in their places, brings the contexts back.
All memory is formed from them in one pass of each kind, with gradients, and one more pass over the answers takes the
new latents in. Prompts are in the cache.

What is fed: every id but the last, each invocation token followed by its N latents. Slot s is the s-th vector fed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from vismem_core.base import cache as kv
from vismem_core.base.backbone import NO_TOKEN
from vismem_core.config import KINDS, Kind
from vismem_core.errors import AttachError
from vismem_core.memory.former import MemoryContext
from vismem_core.memory.memory import Memory

from .checkpointed import checkpointed
from .grouped import grouped
from .prefix import ReadOnly
from .session import Session
from .turn import TURN


@dataclass
class Answer:
    """Ids that followed a prompt, and what was formed among them.

    Attributes:
        prompt: number of its prompt in the batch.
        latents: (N, d) that followed the invocation token at that index.
        drops_images: whether its images were out of sight once memory had been formed.
    """

    prompt: int
    ids: list[int] = field(default_factory=list)
    latents: dict[int, Tensor] = field(default_factory=dict)
    drops_images: bool = False

    @property
    def invocations(self) -> list[int]:
        """Indices of the invocation tokens, in order."""
        return sorted(self.latents)

    @property
    def slots(self) -> list[int]:
        """The slot of every id; the last one is not fed, its number is how many are."""
        slots, at = [], 0
        for index in range(len(self.ids)):
            slots.append(at)
            at += 1 + (len(self.latents[index]) if index in self.latents else 0)
        return slots


@dataclass(frozen=True)
class Prompts:
    """B prompts that were read once; every rollout and replay goes on from a branch of ``session``."""

    session: Session
    ids: Tensor
    mask: Tensor
    positions: Tensor


def read_prompts(
    memory: Memory, inputs: Any, *, gradients: bool = False, kinds: Sequence[Kind] | None = None
) -> Prompts:
    """Encode B prompts (``Backbone.inputs``), images and text.

    Args:
        kinds: of memory that may be formed; by default those that the trigger may ask for.
    """
    backbone, session = memory.backbone, Session(memory.backbone, memory.needs(kinds))
    with torch.set_grad_enabled(gradients), TURN.call(), session.listen():
        positions = backbone.positions(inputs)
        # All states of the prompts are wanted: no number, by which some language models compute few to the end.
        kept = {"logits_to_keep": slice(-1, None), "use_cache": True, "return_dict": True}
        output = backbone.model(**inputs, position_ids=positions, **kept, **kv.fresh(backbone.model))
        session.start(inputs["input_ids"], inputs["attention_mask"], positions, getattr(output, kv.NAME))
    return Prompts(session, inputs["input_ids"], inputs["attention_mask"], positions)


class Replay:
    """R answers, padded on the right to S slots.

    Args:
        checkpointing: compute the decoder's layers again in the backward pass instead of keeping their insides.
    """

    def __init__(
        self,
        memory: Memory,
        prompts: Prompts,
        answers: Sequence[Answer],
        checkpointing: bool = False,
    ) -> None:
        self.memory, self.backbone, self.checkpointing = memory, memory.backbone, checkpointing
        self.answers = answers
        self.prompts = prompts.session.branch([own.prompt for own in answers])
        self.slots = [own.slots for own in answers]
        self.length = max(slots[-1] for slots in self.slots)
        device = self.prompts.mask.device
        fed = torch.tensor([[1] * slots[-1] + [0] * (self.length - slots[-1]) for slots in self.slots])
        self.columns = torch.cat([self.prompts.mask, fed.to(self.prompts.mask)], dim=1)
        self.before = self._before().to(device)  # (R, S + 1), how far the text's positions are before each slot
        self.positions = self._positions()
        self._then: dict[int, list[Any]] = {}  # by columns read, the layers that forget as they were then

    def hidden(self, *, form: bool) -> Tensor:
        """Last hidden states before each slot and after the last one, (R, S + 1, d).

        Args:
            form: form the memory anew, with gradients; otherwise the latents that are known are constants.
        """
        return self._hidden(self._embeds(self._formed() if form else self._recorded()))

    def forms(self, places: Sequence[tuple[int, int]]) -> list[Tensor]:
        """The latents (N, d) formed at places (row, index of the token) of one kind, without gradients."""
        with torch.no_grad():
            kind = self.memory.tokens.kind(self.answers[places[0][0]].ids[places[0][1]])
            assert kind is not None
            return list(self._form(kind, places))

    def context(self, places: Sequence[tuple[int, int]]) -> MemoryContext:
        """What memory could look at when it was invoked at places (row, index of the token), without gradients."""
        return self._context(places, *self._past)

    # The sequence

    def _before(self) -> Tensor:
        moves = torch.ones(len(self.slots), self.length + 1, dtype=torch.long)
        for row, _, first, count in self._standing():
            moves[row, first : first + count] = 0
        return moves.cumsum(1) - moves

    def _positions(self) -> Tensor:
        """The position id of each slot, (.., R, S)."""
        positions = self.prompts.positions + self.before[:, :-1]
        for row, standing, first, count in self._standing():
            positions[..., row, first : first + count] = standing
        return positions

    def _standing(self) -> Iterator[tuple[int, Tensor, int, int]]:
        """Latents that stand where their row's images stood: row, position ids (.., N), first slot, N."""
        for row, (own, slots) in enumerate(zip(self.answers, self.slots, strict=True)):
            for index, latents in own.latents.items():
                standing = self.prompts.image_places.standing(
                    [row], len(latents), self.prompts.positions[..., [row], :]
                )
                if standing is not None and self.prompts.image_places.passed([row], len(latents)) == [0]:
                    yield row, standing[..., 0, :], slots[index] + 1, len(latents)

    @cached_property
    def _hidden_from(self) -> Tensor:
        """The first slot (R,) from which each row does not see its images; there is none at S."""
        first = [
            slots[own.invocations[0]] + 1 if own.drops_images and own.invocations else self.length
            for own, slots in zip(self.answers, self.slots, strict=True)
        ]
        return torch.tensor(first, device=self.columns.device)

    @cached_property
    def _images(self) -> Tensor:
        """Which columns of cache and answer are images, (R, W + S)."""
        return F.pad(self.prompts.image_columns(), (0, self.length))

    @cached_property
    def _mask(self) -> Tensor:
        """What slots may look at: (R, W + S), or (R, 1, S, W + S) if images are hidden from some of them."""
        slots = torch.arange(self.length, device=self.columns.device)
        blind = slots >= self._hidden_from[:, None]
        if not blind.any():
            return self.columns
        self._check()
        earlier = self.columns.new_ones(self.length, self.columns.shape[1]).tril(self.prompts.mask.shape[1])
        seen = self.columns[:, None] * earlier * ~(blind[:, :, None] & self._images[:, None])
        dtype = self.backbone.dtype
        return torch.zeros_like(seen, dtype=dtype).masked_fill(seen == 0, torch.finfo(dtype).min)[:, None]

    def _check(self) -> None:
        """Hidden images take a mask of the passes' own, which not every attention reads."""
        config: Any = self.backbone.decoder.config
        if config._attn_implementation not in ("sdpa", "eager"):
            raise AttachError(
                f"image dropout needs attention of type sdpa or eager, not {config._attn_implementation}: "
                "load the model with attn_implementation='sdpa'"
            )
        if not kv.whole(self.prompts.cache):
            raise AttachError(
                "image dropout does not work with sliding windows, convolutions and linear attention: train with "
                "image_dropout=0"
            )

    @cached_property
    def _ids(self) -> Tensor:
        """The id of each slot (R, S); latents and padding have none."""
        ids = torch.full((len(self.slots), self.length), NO_TOKEN)
        for row, (own, slots) in enumerate(zip(self.answers, self.slots, strict=True)):
            for token, slot in zip(own.ids[:-1], slots, strict=False):
                ids[row, slot] = token
        return ids.to(self.backbone.device)

    def _embeds(self, latents: Sequence[tuple[Kind, list[tuple[int, int]], Tensor]]) -> Tensor:
        """What is fed, (R, S, d); latents are given as kind, places (row, index of the token), vectors (n, N, d)."""
        pad = int(self.backbone.processor.tokenizer.pad_token_id)
        embeds: Tensor = self.backbone.embed(self._ids.masked_fill(self._ids == NO_TOKEN, pad))
        for _, places, vectors in latents:
            rows = torch.tensor([row for row, _ in places], device=embeds.device)[:, None]
            first = torch.tensor([self.slots[row][index] + 1 for row, index in places], device=embeds.device)
            columns = first[:, None] + torch.arange(vectors.shape[1], device=embeds.device)
            embeds = embeds.index_put((rows.expand_as(columns), columns), vectors.to(embeds))
        return embeds

    def _recorded(self) -> list[tuple[Kind, list[tuple[int, int]], Tensor]]:
        return [
            (kind, places, torch.stack([self.answers[row].latents[index] for row, index in places]))
            for kind, places in self._places().items()
        ]

    def _places(self) -> dict[Kind, list[tuple[int, int]]]:
        found: dict[Kind, list[tuple[int, int]]] = {}
        for row, own in enumerate(self.answers):
            for index in own.invocations:
                kind = self.memory.tokens.kind(own.ids[index])
                assert kind is not None
                found.setdefault(kind, []).append((row, index))
        return found

    # The passes

    def _hidden(self, embeds: Tensor) -> Tensor:
        """Last hidden states before each slot and after the last one, (R, S + 1, d)."""
        before = self.prompts.hidden[:, -1:]
        if not self.length:
            return before
        cache, mask = ReadOnly(self.prompts.cache), self._mask
        with (
            self.memory.acting(),
            grouped(self.backbone.decoder) if self.backbone.packs else nullcontext(),
            checkpointed(self.backbone.decoder, self.memory) if self.checkpointing else nullcontext(),
        ):
            beside = self.backbone.companions(self._ids)
            after = self.backbone.continue_(embeds, mask, self.positions, cache, **beside)
        return torch.cat([before.to(after), after], dim=1)

    def _formed(self) -> list[tuple[Kind, list[tuple[int, int]], Tensor]]:
        recorded = self._recorded()
        if not recorded:
            return []
        return [(kind, places, self._form(kind, places)) for kind, places, _ in recorded]

    def _form(self, kind: Kind, places: Sequence[tuple[int, int]]) -> Tensor:
        context = self._context(places, *self._past)
        former = self.memory.former(kind)
        context.query = self.memory.builder(context.states, context.mask)
        behind = context.next_position + context.query.shape[1]
        context.standing = self.prompts.image_places.standing([row for row, _ in places], former.config.length, behind)
        latents: Tensor = former(context)
        return self.memory.entering(latents)

    @cached_property
    def _past(self) -> tuple[Tensor, Tensor, DynamicCache]:
        """The answers as they were written, without gradients: what was fed (R, S, d), the states before each slot and
        after the last one (R, S + 1, d), and the cache."""
        with torch.no_grad(), self.memory.acting():
            embeds = self._embeds(self._recorded())
            grown = kv.fork(self.prompts.cache)
            after = [self.prompts.hidden[:, -1:]]
            width = self.prompts.mask.shape[1]
            for start, stop in pairwise(self._pauses(grown)):
                mask = self._mask if self._mask.ndim == 4 else self._mask[:, : width + stop]
                piece = slice(start, stop)
                places, beside = self.positions[..., piece], self.backbone.companions(self._ids[:, piece])
                after.append(self.backbone.continue_(embeds[:, piece], mask, places, grown, **beside))
                self._then[width + stop] = kv.forgetful(grown)
            return embeds, torch.cat([own.to(after[-1]) for own in after], dim=1), grown

    def _pauses(self, cache: DynamicCache) -> list[int]:
        """The slots between which the answers are read: layers that forget are looked at wherever memory was formed."""
        width = self.prompts.mask.shape[1] + self.length
        windows = [layer.sliding_window for layer in kv.forgetful(cache) if not kv.stateful(layer)]
        if not kv.states(cache) and all(width < own for own in windows):
            return [0, self.length]
        formed = {
            slot + 1
            for own, slots in zip(self.answers, self.slots, strict=True)
            for token, slot in zip(own.ids, slots, strict=True)
            if self.memory.tokens.kind(token) and slot < self.length
        }
        return sorted({0, self.length, *formed})

    def _context(
        self, places: Sequence[tuple[int, int]], embeds: Tensor, hidden: Tensor, grown: DynamicCache
    ) -> MemoryContext:
        """What memory could look at when it was invoked at each of the places, right after the invocation token."""
        rows = [row for row, _ in places]
        stops = [self.slots[row][index] + 1 for row, index in places]
        segments = [hidden[row, self._segment(row, index)] for row, index in places]
        written = pad_sequence(segments, batch_first=True)
        fresh = pad_sequence([own.new_ones(len(own), dtype=torch.bool) for own in segments], batch_first=True)
        visual, seen = self.prompts.visual(rows)
        index = torch.tensor(rows, device=self.positions.device)
        steps = torch.tensor(stops, device=self.positions.device)[:, None]
        passed = self.before[index].gather(1, steps)
        width = self.prompts.mask.shape[1]
        late = steps > self._hidden_from[index, None]  # memory formed first still sees the images
        columns = self.columns[index].masked_fill(self._images[index] & late, 0)
        ends = [width + stop for stop in stops]
        cache, mask = kv.upto(grown, columns, rows, ends, self._then if self._then.keys() >= set(ends) else None)
        history = None
        vision, numbers = self.prompts.sights(rows)
        if self.prompts.needs.history:
            told = [
                (embeds[row, :stop], self.positions[..., row, :stop]) for row, stop in zip(rows, stops, strict=True)
            ]
            history = self.prompts.history(rows, told)
        return MemoryContext(
            states=torch.cat([visual, written.to(visual)], dim=1),
            mask=torch.cat([seen, fresh.to(seen.device)], dim=1),
            visual=visual.shape[1],
            query=visual[:, :0],
            cache=cache,
            attention_mask=mask,
            next_position=self.prompts.positions[..., index, :] + passed,
            vision=vision,
            rows=numbers,
            history=history,
        )

    def _segment(self, row: int, index: int) -> list[int]:
        """Slots before which the tokens since the last end token were chosen, that at ``index`` the last."""
        ids, slots = self.answers[row].ids, self.slots[row]
        ends = [self.memory.tokens.end(kind) for kind in KINDS]
        first = next((at + 1 for at in range(index, -1, -1) if ids[at] in ends), 0)
        return slots[first : index + 1]
