"""What memory knows of one batch: what it saw, what it wrote since the last end token, where its cache stands."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from vismem_core.base import cache as kv
from vismem_core.base.backbone import Backbone
from vismem_core.base.vision import VisionStates
from vismem_core.errors import AttachError
from vismem_core.memory.former import History, MemoryContext, MemoryFormer, Needs, RidingFormer
from vismem_core.memory.query import Ahead, QueryBuilder

from .image_places import ImagePlaces
from .room import RoomCache

OWN = ("_written", "_images", "_padding", "_history", "_sights")
"""Lists of what there is of each row."""


class Session:
    """Follows one batch from its prefill on.

    Attributes:
        cache: the language model's KV cache: of the prompts as transformers keep it, right-aligned, and from
            :meth:`make_room` on one in which rows grow apart (:mod:`vismem_core.decoding.room`).
        positions: (.., B, 1), the position id of each row's next token.
        hidden, embeds: (B, L, d), what left and entered the language model in the latest pass through :meth:`listen`.
        vision: the vision encoder's states of the prefill.
        image_places: where the images stand, if latents are to stand there.
    """

    def __init__(self, backbone: Backbone, needs: Needs) -> None:
        self.backbone, self.needs = backbone, needs
        self.vision = VisionStates()
        self.cache: DynamicCache
        self._mask: Tensor
        self.positions: Tensor
        self.hidden: Tensor
        self.embeds: Tensor
        self._entered: Tensor | None = None  # what entered by the backbone's entrance, where it has one
        self._given: Tensor | None = None  # position ids of the latest pass, where the language model got any
        self._visual: Tensor
        self._visual_mask: Tensor
        self._images: list[Tensor] = []  # each row's visual tokens that it may see, counted from its first token
        self.image_places = ImagePlaces()
        self._source: list[int]  # each row's row of the visual tokens, which copies of a prompt share
        self._ahead: dict[int, Ahead]  # of each row of the visual tokens, once asked for
        self._recording = ExitStack()
        self._started = self._forming = False
        self._written: list[list[Tensor]] = []  # each row's states (d,) since its last end token
        self._sights: list[tuple[VisionStates, int]] = []  # where each row's images are, and its number there
        self._padding: list[int] = []
        self._history: list[list[tuple[Tensor, Tensor]]] = []

    @property
    def mask(self) -> Tensor:
        """What rows may look at, (B, W) over the cache."""
        return self.cache.mask.long() if isinstance(self.cache, RoomCache) else self._mask

    @property
    def shown(self) -> Tensor:
        """The same as the model is shown it."""
        return self.room.shown.long()

    @property
    def room(self) -> RoomCache:
        """The cache once rows may grow apart."""
        assert isinstance(self.cache, RoomCache)
        return self.cache

    @property
    def rows(self) -> int:
        """B"""
        return len(self._written)

    def make_room(self, ahead: int = 0, left: Sequence[Tensor] = ()) -> None:
        """From now on rows may grow apart, and come to write so many columns, where that is known.

        Args:
            left: room of an earlier call (:class:`RoomCache`).
        """
        self.cache = RoomCache(self.cache, self._mask, ahead=ahead, left=left)

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Note what enters and leaves the language model, and what the vision encoder computes, inside the context."""

        def enter(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._forming:
                return
            embeds = kwargs.get("inputs_embeds")
            ids = kwargs.get("input_ids", args[0] if args else None)
            self.embeds = embeds if embeds is not None else self.backbone.embeddings(ids)
            self._given = kwargs.get("position_ids")

        def pass_by(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._forming:
                self._entered = next(iter((*args, *kwargs.values())))

        def leave(module: Any, args: Any, output: Any) -> None:
            if not self._forming:
                hidden = output[0] if isinstance(output, tuple) else output.last_hidden_state
                self.hidden = hidden.to(self.backbone.device)  # from the last layer's, where layers are spread

        decoder, needs = self.backbone.decoder, self.needs
        with ExitStack() as stack:
            stack.callback(decoder.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(decoder.register_forward_hook(leave).remove)
            if not self._started and (entrance := self.backbone.entrance) is not None:
                stack.callback(entrance.register_forward_pre_hook(pass_by, with_kwargs=True).remove)
            stack.enter_context(self._recording)
            if not self._started and (needs.vision_cache or needs.vision_inputs):
                recording = self.backbone.record(self.vision, keep=needs.vision_cache, inputs=needs.vision_inputs)
                self._recording.enter_context(recording)
            yield

    def places(self, told: Tensor) -> Tensor:
        """The position ids (.., B, L) by which the prompt was read, if ``told`` is what the model was called with.

        Some models make their own of them, and some language models count for themselves, padding included.
        """
        if self._given is None:
            steps = torch.arange(told.shape[-1], device=told.device)
            return steps.expand_as(told)
        alike = self._given.ndim == told.ndim and all(
            mine in (1, theirs) for mine, theirs in zip(self._given.shape, told.shape, strict=True)
        )
        return self._given.expand_as(told) if alike else told

    def start(
        self,
        input_ids: Tensor,
        mask: Tensor | None,
        positions: Tensor,
        cache: object,
        written: Sequence[int] | None = None,
    ) -> None:
        """Begin after the prefill.

        Args:
            input_ids: (B, L), left-padded prompts.
            mask: (B, past + L), or None if nothing is padding.
            positions: (.., B, L), the prompt's position ids.
            written: how many tokens at each row's end belong to its answer already (none by default).
        """
        self._recording.close()
        self._started = True
        batch, length = input_ids.shape
        if self.embeds.shape[1] != length:
            raise AttachError("memory needs the prompt's input_ids: it cannot tell images from text in inputs_embeds")
        self.cache = kv.check(cache, self.backbone.decoder.config)
        width = self.cache.get_seq_length()
        self._mask = input_ids.new_ones(batch, width) if mask is None else mask[:, :width]
        self._padding = self._mask.argmax(-1).tolist() if mask is not None else [0] * batch
        self.positions = positions.expand(*positions.shape[:-2], batch, length)[..., -1:] + 1
        self._see(input_ids)
        if self.needs.image_places:
            own = positions.expand(*positions.shape[:-2], batch, length)
            seen = zip(self._images, self._padding, strict=True)
            self.image_places = ImagePlaces(
                [own[..., row, here.to(own.device) + start] for row, (here, start) in enumerate(seen)]
            )
        counts = written or [0] * batch
        self._written = [list(own[-1 - count :]) for own, count in zip(self.hidden, counts, strict=True)]
        own = positions.expand(*positions.shape[:-2], batch, length)
        starts = enumerate(self._padding)
        self._history = [
            [(self.embeds[row, start:], own[..., row, start:])] if self.needs.history else [] for row, start in starts
        ]

    def _see(self, input_ids: Tensor) -> None:
        media = [input_ids == token for token in self.backbone.placeholders.values()]
        for medium, token in self.backbone.unseen.items():
            if bool((input_ids == token).any()):
                warnings.warn(f"short memory does not see {medium}s of this model, long memory does", stacklevel=2)
        seen = torch.stack(media).any(0)
        entered = self.embeds if self._entered is None else self._entered.to(self.embeds.device)
        tokens = [own[here.to(own.device)] for own, here in zip(entered, seen, strict=True)]
        self._look([own.float() for own in tokens])
        self._images = [own.nonzero().flatten() - start for own, start in zip(seen, self._padding, strict=True)]
        self.vision.assign([medium.sum(-1).tolist() for medium in media])
        self._sights = [(self.vision, row) for row in self._source]

    def _look(self, tokens: list[Tensor]) -> None:
        """Visual tokens (y, d), those of each row."""
        self._visual = pad_sequence(tokens, batch_first=True)
        counts = torch.tensor([len(own) for own in tokens], device=self._visual.device)
        self._visual_mask = torch.arange(self._visual.shape[1], device=counts.device) < counts[:, None]
        self._source, self._ahead = list(range(len(tokens))), {}

    def observe(self, ended: Sequence[int]) -> None:
        """Note the states of the token just fed; rows in ``ended`` were fed their end token and begin a segment."""
        for row in ended:
            self._written[row] = []
        for own, state in zip(self._written, self.hidden[:, -1], strict=True):
            own.append(state)
        if self.needs.history:
            for row, pieces in enumerate(self._history):
                pieces.append((self.embeds[row, -1:], self.positions[..., row, :]))

    def part(self) -> tuple[Tensor, Tensor]:
        """As if only the first of the tokens of the latest pass had entered; states and embeddings of the last one."""
        later = self.hidden[:, -1:], self.embeds[:, -1:]
        self.hidden, self.embeds = self.hidden[:, :1], self.embeds[:, :1]
        return later

    def advance(self, tokens: int = 1) -> None:
        """Every row took in ``tokens`` tokens."""
        self.positions = self.positions + tokens

    # Rows

    def branch(self, rows: Sequence[int], *, room: bool = False, shared: bool = False) -> Session:
        """A session of the given rows in that order, one perhaps several times, as a prompt for its group.

        This one stays as it is. Nothing is heard by the new one until it is what :meth:`listen` was called on.

        Args:
            room: the new one's rows may grow apart.
            shared: they hold the columns of this one's together (:class:`RoomCache`).
        """
        branch = copy.copy(self)
        branch._recording, branch._ahead = ExitStack(), {}
        if room:
            branch.cache = RoomCache(self.cache, self._mask, rows, shared=shared)
        branch._take(rows)
        return branch

    def take(self, rows: Sequence[int]) -> None:
        """Go on with the given rows alone."""
        self.cache = self.room.select(rows)
        self._take(rows)

    def _take(self, rows: Sequence[int]) -> None:
        index = torch.as_tensor(rows, device=self.positions.device)
        if not isinstance(self.cache, RoomCache):
            self.cache, self._mask = kv.select(self.cache, rows), self._mask[index]
        self.positions = self.positions[..., index, :]
        self.hidden = self.hidden[index.to(self.hidden.device), -1:]
        self._source = [self._source[row] for row in rows]
        self.image_places = self.image_places.take(rows)
        for name in OWN:
            own = getattr(self, name)
            setattr(self, name, [copy.copy(own[row]) for row in rows])

    def seat(self, rows: Sequence[int], other: Session) -> None:
        """In the places of these rows go on those of another session, which has read its prompts."""
        self.room.seat(rows, *other._together(range(other.rows)))
        index = torch.as_tensor(rows, device=self.positions.device)
        self.positions = self.positions.index_copy(-2, index, other.positions.expand_as(self.positions[..., rows, :]))
        self.hidden = self.hidden[:, -1:].index_copy(0, index.to(self.hidden.device), other.hidden[:, -1:])
        self.image_places = self.image_places.seat(rows, other.image_places)
        for name in OWN:
            for row, own in zip(rows, getattr(other, name), strict=True):
                getattr(self, name)[row] = own
        mine, theirs = (own.visual(range(own.rows)) for own in (self, other))
        tokens = [own[:count] for own, count in zip(mine[0], mine[1].sum(1).tolist(), strict=True)]
        for row, own, count in zip(rows, theirs[0], theirs[1].sum(1).tolist(), strict=True):
            tokens[row] = own[:count]
        self._look(tokens)

    # Forming

    def form(self, rows: Sequence[int], builder: QueryBuilder, former: MemoryFormer, fed: bool = True) -> Tensor:
        """The latents (R, N, d) of ``rows`` that invoke it.

        Args:
            fed: whether they have been fed their invocation tokens, which an early former need not wait for.
        """
        context = self.context(rows, fed, cached=not former.early)
        with self.apart():
            context.query = self._query(rows, builder, context.states, context.mask)
            behind = context.next_position + context.query.shape[1]
            context.standing = self.image_places.standing(rows, former.config.length, behind)
            latents: Tensor = former(context)
        return latents

    def rider(self, rows: Sequence[int], builder: QueryBuilder, former: RidingFormer) -> Tensor:
        """For ``rows`` that are yet to be fed their invocation tokens: what rides behind these, (R, E, d)."""
        states, mask = self._states(rows)
        return former.rider(self._query(rows, builder, states, mask))

    def _query(self, rows: Sequence[int], builder: QueryBuilder, states: Tensor, mask: Tensor) -> Tensor:
        """Q (R, K, d); what can be computed of a prompt's visual tokens alone is computed once."""
        sources = [self._source[row] for row in rows]
        if new := sorted(set(sources) - set(self._ahead)):
            index = torch.as_tensor(new, device=self._visual.device)
            known = builder.ahead(self._visual[index], self._visual_mask[index])
            self._ahead |= {source: tuple(own[at : at + 1] for own in known) for at, source in enumerate(new)}
        told = [self._ahead[source] for source in sources]
        ahead = told[0] if len(rows) == 1 else tuple(map(torch.cat, zip(*told, strict=True)))
        query: Tensor = builder(states, mask, ahead) if ahead else builder(states, mask)
        return query

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Passes through the language model inside the context are memory's own business."""
        self._forming = True
        try:
            yield
        finally:
            self._forming = False

    def context(self, rows: Sequence[int], fed: bool = True, cached: bool = True) -> MemoryContext:
        """What memory may look at for ``rows``, with an empty query.

        Args:
            fed: whether the last token that was fed is their invocation token.
            cached: with the language model's cache.
        """
        index = torch.as_tensor(rows, device=self.positions.device)
        states, mask = self._states(rows, fed)
        vision, numbers = self.sights(rows)
        cache, seen = self._together(rows) if cached else (DynamicCache(), self.mask[index, :0])
        return MemoryContext(
            states=states,
            mask=mask,
            visual=self._visual.shape[1],
            query=states[:, :0],
            cache=cache,
            attention_mask=seen,
            next_position=self.positions[..., index, :],
            vision=vision,
            rows=numbers,
            history=self.history(rows) if self.needs.history else None,
        )

    def _together(self, rows: Sequence[int]) -> tuple[DynamicCache, Tensor]:
        """The cache of some rows, which may be appended to, and its mask."""
        if isinstance(self.cache, RoomCache):
            return self.cache.together(rows)
        return kv.select(self.cache, rows), self._mask[torch.as_tensor(rows, device=self._mask.device)]

    def _states(self, rows: Sequence[int], fed: bool = False) -> tuple[Tensor, Tensor]:
        visual, seen = self.visual(rows)
        told = [torch.stack(own[: len(own) - fed]) for own in map(self._written.__getitem__, rows)]
        written = pad_sequence(told, batch_first=True, padding_side="left")
        begin = torch.tensor([written.shape[1] - len(own) for own in told], device=written.device)
        fresh = torch.arange(written.shape[1], device=written.device) >= begin[:, None]
        return torch.cat([visual, written.to(visual)], dim=1), torch.cat([seen, fresh.to(seen.device)], dim=1)

    def sights(self, rows: Sequence[int]) -> tuple[VisionStates, list[int]]:
        """What the vision encoder computed of the prompts that ``rows`` go on from, and their numbers in it."""
        return VisionStates.together([self._sights[row] for row in rows])

    def visual(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Projected visual tokens of ``rows`` in fp32, (R, y, d), and their mask (R, y)."""
        source = torch.as_tensor([self._source[row] for row in rows], device=self._visual.device)
        return self._visual[source], self._visual_mask[source]

    def history(self, rows: Sequence[int], told: Sequence[tuple[Tensor, Tensor]] = ()) -> History:
        """All that ``rows`` fed to the language model, images that have left the cache included.

        Args:
            told: what each row fed besides: (L, d) and (.., L).
        """
        pieces = [[*self._history[row], *told[at : at + 1]] for at, row in enumerate(rows)]
        return History.of(pieces, self.mask)

    # Forgetting images

    def image_columns(self) -> Tensor:
        """Where in the cache the visual tokens are that rows may see, (B, W)."""
        found = torch.zeros_like(self.mask, dtype=torch.bool)
        for row, (start, own) in enumerate(zip(self._padding, self._images, strict=True)):
            found[row, own + start] = True
        return found

    def hide_images(self, rows: Sequence[int]) -> None:
        """Nothing that ``rows`` take in from now on sees their images in the cache; positions go on as they were.

        Where rows may grow apart, the columns are given up (:meth:`RoomCache.hide`).
        """
        if not any(len(self._images[row]) for row in rows):
            return
        hidden = self.image_columns()
        hidden[[row for row in range(len(hidden)) if row not in set(rows)]] = False
        for row in rows:
            self._images[row] = self._images[row][:0]
        if not isinstance(self.cache, RoomCache):
            self._mask = self._mask.masked_fill(hidden, 0)
        elif self.cache.hide(hidden):
            self._padding = [0] * len(hidden)

    # Taking in

    def packs(self, model_kwargs: Mapping[str, Any]) -> bool:
        """Whether passes may be packed: the model's attention allows it, and nobody watches what is inside."""
        attention = self.backbone.decoder.config._attn_implementation  # type: ignore[union-attr]
        plain = not self.needs.image_places and not self.watched(model_kwargs)
        return self.backbone.packs and attention == "sdpa" and plain

    @staticmethod
    def watched(model_kwargs: Mapping[str, Any]) -> bool:
        """Whether the call returns what is inside of passes."""
        return bool(model_kwargs.get("output_attentions") or model_kwargs.get("output_hidden_states"))

    def places_of(self, rows: Sequence[int], length: int) -> Tensor:
        """Position ids (.., R, L) of the next L tokens of some rows."""
        index = torch.as_tensor(rows, device=self.positions.device)
        return self.positions[..., index, :] + torch.arange(length, device=self.positions.device)

    def took_in(self, rows: Sequence[int], vectors: Tensor, positions: Tensor) -> None:
        """Latents enter the cache at positions (.., R, N)."""
        index = torch.as_tensor(rows, device=self.positions.device)
        passed = self.positions.new_tensor(self.image_places.passed(rows, vectors.shape[1]))[:, None]
        steps = passed.expand_as(self.positions[..., index, :])
        self.positions = self.positions.index_add(-2, index, steps)
        if self.needs.history:
            for at, row in enumerate(rows):
                self._history[row].append((vectors[at], positions[..., at, :]))
